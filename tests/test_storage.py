"""What a run's folder lies on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlsearch.storage import existing_folder, file_system, flush_seconds, storage_warnings

MOUNTS = """\
24 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 24 0:27 / /home rw,relatime shared:9 - nfs4 server:/export/home rw,vers=4.2
36 31 0:28 / /home/ada/fast\\040disk rw - xfs /dev/vdb rw
40 24 0:30 / /mnt rw - ext4 /dev/vdc rw
41 24 0:31 / /mnt rw - cifs //server/share rw
broken line
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", "ext4"),
        ("/homes", "ext4"),
        ("/home", "nfs4"),
        ("/home/ada/runs", "nfs4"),
        ("/home/ada/fast disk/runs", "xfs"),
        ("/mnt/x", "cifs"),
    ],
)
def test_the_innermost_and_last_mount_counts(folder: str, kind: str) -> None:
    assert file_system(Path(folder), MOUNTS) == kind


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="/dev/shm is no mount here")
def test_the_system_tells_its_own_mounts() -> None:
    assert file_system(Path("/dev/shm")) == "tmpfs"


def test_a_good_place_has_no_warning_and_nothing_stays_there(tmp_path: Path) -> None:
    assert storage_warnings(tmp_path / "not" / "there" / "yet", 1e3, "24 1 254:0 / / rw - ext4 /dev/vda rw") == []
    assert list(tmp_path.iterdir()) == []
    assert existing_folder(tmp_path / "not" / "there") == tmp_path
    assert 0 < flush_seconds(tmp_path) < 60


def test_too_little_room_and_a_network_file_system_are_told(tmp_path: Path) -> None:
    network, room = storage_warnings(tmp_path / "run", 1e18, "24 1 0:27 / / rw - nfs4 server:/ rw")[:2]
    assert network.startswith(f"{tmp_path} is on a network file system (nfs4), where locks can fail")
    assert "GB free, and this needs about 1000000000.0 GB; free some space" in room
