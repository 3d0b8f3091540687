"""``rlsearch doctor``: what this machine has, what is wrong, and how to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rlsearch.cli.doctor_ray import Finding, ray_findings
from rlsearch.errors import UserError

_PACKAGES = ("torch", "torchvision", "ray", "optuna", "pyarrow", "tensorboard", "moocore", "safetensors")
_LEAST_FREE_BYTES = 5e9
_FAR_SECONDS = 0.05


def doctor(
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A Ray cluster to look at; else RAY_ADDRESS, if it is set.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Looks at Python, packages, GPUs, Ray, storage, PostgreSQL and authentication, and says what to mend, and how.

    Example: rlsearch doctor
    """
    import json

    findings = [*_python(), *_packages(), *_devices(), *ray_findings(address), *_storage(), *_database()]
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings)
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table = Table("", "what", "found", "remedy")
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(status, finding.what, Text(finding.found), Text(finding.remedy))
    Console().print(table)


def _python() -> list[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    return [Finding("Python", "ok", found)]


def _packages() -> list[Finding]:
    findings = []
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
            importlib.import_module(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "error", "not installed", "bash launch/local.sh installs everything"))
        except (ImportError, OSError, RuntimeError) as error:
            remedy = "install torch and torchvision of one kind (both for CUDA or both for the CPU)"
            findings.append(Finding(name, "error", f"cannot be imported: {error}", remedy))
        else:
            findings.append(Finding(name, "ok", version))
    return findings


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []  # _packages has said so
    if not torch.cuda.is_available():
        built = torch.version.cuda
        found = "none; trials train on the CPU"
        if built and shutil.which("nvidia-smi"):
            remedy = f"there is an NVIDIA driver, but torch (CUDA {built}) sees no GPU: update the driver"
            return [Finding("GPU", "warning", found, remedy)]
        return [Finding("GPU", "ok", found)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = f"{properties.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        busy = free < 0.5 * total
        remedy = "another process holds most of its memory; times and packing will suffer" if busy else ""
        findings.append(Finding(f"GPU {index}", "warning" if busy else "ok", found, remedy))
    return findings


def _storage() -> list[Finding]:
    from rlsearch.storage import file_system, storage_warnings

    findings = []
    for what, folder in (("run folders", Path.cwd()), ("temporary files", Path(os.environ.get("TMPDIR", "/tmp")))):
        if not os.access(folder, os.W_OK):
            findings.append(Finding(what, "error", f"{folder} is not writable", "choose another folder"))
            continue
        kind = file_system(folder)
        found = f"{folder}: {shutil.disk_usage(folder).free / 1e9:.0f} GB free{f', {kind}' if kind else ''}"
        warnings = storage_warnings(folder, _LEAST_FREE_BYTES)
        findings.append(Finding(what, "warning" if warnings else "ok", found, "; ".join(warnings)))
    return findings


def _database() -> list[Finding]:
    """A team's database, where the environment names one."""
    if not {"PGHOST", "PGSERVICE", "PGDATABASE"} & set(os.environ):
        return []
    try:
        from rlsearch.search.postgresql import look_at_postgresql, postgresql_place
    except ImportError:
        return []  # _packages has said so
    try:
        version, seconds = look_at_postgresql()
    except UserError as error:
        found, _, remedy = str(error).removeprefix("search.storage: ").partition("; ")
        return [Finding("PostgreSQL", "warning", found, remedy)]
    found = f"{version} at {postgresql_place()}, {1000 * seconds:.1f} ms a query"
    is_far = seconds > _FAR_SECONDS
    remedy = "it is far: every proposal and every trial's end ask it several times; keep it in the cluster's network"
    return [Finding("PostgreSQL", "warning" if is_far else "ok", found, remedy if is_far else "")]
