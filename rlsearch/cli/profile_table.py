"""The tables of ``rlsearch profile`` for people: equal units in one row, equal blocks in one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

_MEGA = 1e6
_NO_FIT = "–"
_SINGLE = "single"
# Letters a chain's name has before it is folded.
_NARROW = 20

Unit = Mapping[str, Any]
Row = tuple[str, ...]


def units_table(content: Mapping[str, Any]) -> Table:
    """What each block saves in each unit, from `profile_content`."""
    cost, units = content["cost"], _by_role(content["units"])
    columns = _columns(units, cost)
    usable = [place for place in range(len(units)) if any(cells[place] != _NO_FIT for cells in columns.values())]
    units = [units[place] for place in usable]
    columns = _merged({header: tuple(cells[place] for place in usable) for header, cells in columns.items()})
    table = Table(
        title=_title(content),
        caption=_caption(len(content["units"]) - len(units), _SINGLE in columns),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title_justify="left",
        caption_justify="left",
    )
    rows = [
        (prefix, [(_label([units[place] for place in group], prefix), group) for group in groups])
        for prefix, groups in _by_chain(units, columns)
    ]
    longest = max(len(label) for _, labelled in rows for label, _ in labelled)
    table.add_column("unit", min_width=longest, max_width=max(longest, _NARROW), overflow="fold", vertical="bottom")
    table.add_column("n", justify="right", no_wrap=True, vertical="bottom")
    table.add_column("params", justify="right", no_wrap=True, vertical="bottom")
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    for prefix, labelled in rows:
        table.add_row(Text(f"{prefix}…", style="bold"))
        for label, group in labelled:
            cells = [cells[group[0]] for cells in columns.values()]
            table.add_row(label, str(len(group)), _short(units[group[0]]["params"]), *cells)
    return table


def _title(content: Mapping[str, Any]) -> str:
    cost = content["cost"]
    size = "×".join(map(str, content["input_shape"]))
    return (
        f"{content['model']}: {cost['params']:,} parameters; images of {size}\n"
        f"an image: {_mega(cost['forward_flops'])} MFLOP forward, {_mega(cost['step_flops'])} a step; "
        f"a step of {content['batch_size']} with {content['optimizer']}: {_mega(cost['memory'])} MB predicted\n"
    )


def _caption(num_left_out: int, has_single: bool) -> str:
    lines = [
        "",
        "A cell: the % of the whole model's parameters/memory/FLOPs of a step that the block saves in one unit alone. "
        f"n: how many such units; params: of one of them. {_NO_FIT}: does not fit.",
        "Of the forward pass alone skip and single save what they save of a step, the other blocks nothing.",
    ]
    if has_single:
        lines.append(f"{_SINGLE}: the block scalar with operator: single, one layer in place of the unit.")
    if num_left_out:
        lines.append(f"Left out: {num_left_out} units in which nothing fits, as the ends of chains.")
    return "\n".join(
        [*lines, "--json has the reasons, the sources, exact numbers, and every block with operator: single."]
    )


def layers_table(content: Mapping[str, Any]) -> Table:
    """Where the cost of the untouched model lies, layer by layer; equal neighbours in one row."""
    table = Table(
        title="where the cost is\n",
        caption=_LAYERS_CAPTION,
        box=SIMPLE_HEAD,
        show_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    for header in ("n", "params", "forward, MFLOP", "step, MFLOP", "saved, MB", "% of the peak"):
        table.add_column(header, justify="right")
    shown = ("params", "forward_flops", "step_flops", "saved", "peak_share")
    for _, alike in groupby(content["layers"], key=lambda layer: [layer[name] for name in shown]):
        layers = list(alike)
        first, last = layers[0]["name"], layers[-1]["name"]
        table.add_row(
            first if first == last else f"{first} … {last}",
            str(len(layers)),
            _short(layers[0]["params"]),
            *(_mega(layers[0][name]) for name in ("forward_flops", "step_flops", "saved")),
            f"{100 * layers[0]['peak_share']:.1f}",
        )
    return table


_LAYERS_CAPTION = (
    "\nOf one layer each: n such layers stand in a row. FLOPs: of one image. Saved: for the backward pass of a batch. "
    "The rest of the peak is the batch, the loss, and what is there for a moment."
)


def policy_tables(content: Mapping[str, Any], title: str) -> list[Table]:
    """What a policy replaces, and what it costs beside the baseline."""
    listing = Table(title=f"{title} replaces\n", box=SIMPLE_HEAD, show_edge=False, title_justify="left")
    listing.add_column("units", overflow="fold")
    listing.add_column("n", justify="right", no_wrap=True)
    listing.add_column("by", overflow="fold")
    groups: dict[tuple[str, str, str], list[Unit]] = {}
    for unit in content["policy"]["units"]:
        options = ", ".join(f"{name}: {value}" for name, value in unit["options"].items())
        block = unit["block"] + (f" ({options})" if options else "")
        groups.setdefault((unit["chain"], unit["role"], block), []).append(unit)
    for (_, role, block), units in groups.items():
        prefix = _prefix(units)
        places = ", ".join(_element(unit).removeprefix(prefix) for unit in units)
        listing.add_row(f"{prefix}{{{places}}}{_ending(role)}", str(len(units)), block)
    if not groups:
        listing.add_row("nothing", "0")
    return [listing, _cost_table(content["cost"], content["policy"]["cost"], title)]


def _cost_table(baseline: Mapping[str, Any], cost: Mapping[str, Any], title: str) -> Table:
    table = Table(
        title=f"{title} beside the baseline (before any layer is dropped)\n",
        box=SIMPLE_HEAD,
        show_edge=False,
        title_justify="left",
    )
    for column in ("", "baseline", "policy", "saved"):
        table.add_column(column, justify="left" if not column else "right")
    rows = {
        "learnable parameters": ("params", 1, ""),
        "predicted memory": ("memory", _MEGA, " MB"),
        "forward of an image": ("forward_flops", _MEGA, " MFLOP"),
        "step of an image": ("step_flops", _MEGA, " MFLOP"),
    }
    for name, (key, unit, suffix) in rows.items():
        before, after = baseline[key], cost[key]
        digits = 0 if unit == 1 else 1
        saved = f"{100 * (1 - after / before) + 0.0:.1f} %"
        table.add_row(name, f"{before / unit:,.{digits}f}{suffix}", f"{after / unit:,.{digits}f}{suffix}", saved)
    return table


def _columns(units: Sequence[Unit], cost: Mapping[str, Any]) -> dict[str, Row]:
    """Header to one cell a unit: a column a block, and one more for operator: single where that fits at all."""
    columns = {block: tuple(_cell(unit["blocks"][block], cost) for unit in units) for block in units[0]["blocks"]}
    # One block stands for all: what is computed is the same, and what is learned differs little.
    single = tuple(_cell(unit["blocks"]["scalar"]["single"], cost) for unit in units)
    return columns | ({_SINGLE: single} if set(single) != {_NO_FIT} else {})


def _merged(columns: Mapping[str, Row]) -> dict[str, Row]:
    """Columns that are equal in every shown digit, in one."""
    headers: dict[Row, list[str]] = {}
    for header, cells in columns.items():
        headers.setdefault(cells, []).append(header)
    return {"\n".join(names): cells for cells, names in headers.items()}


def _cell(saving: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    if not saving["fits"]:
        return _NO_FIT
    shares = (100 * saving[f"{key}_saved"] / cost[key] for key in ("params", "memory", "step_flops"))
    return "/".join(_share(share) for share in shares)


def _share(share: float) -> str:
    """One decimal where it tells something."""
    if abs(share) < 0.05:
        return "0"
    return f"{share:.0f}" if abs(share) >= 10 else f"{share:.1f}"


def _by_role(units: Sequence[Unit]) -> list[Unit]:
    """The chains in forward order; in each the whole elements first, then role by role."""
    order: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        order.setdefault((unit["chain"], unit["role"]), []).append(unit)
    chains = list(dict.fromkeys(unit["chain"] for unit in units))
    return [unit for chain in chains for key, of_role in order.items() if key[0] == chain for unit in of_role]


def _by_chain(units: Sequence[Unit], columns: Mapping[str, Row]) -> list[tuple[str, list[list[int]]]]:
    """For each chain what the names of its elements begin with, and the places of its units, consecutive ones of a role
    together where their rows are equal."""

    def row(place: int) -> tuple[Any, ...]:
        return units[place]["role"], units[place]["params"], *(cells[place] for cells in columns.values())

    found = []
    for _, of_chain in groupby(range(len(units)), key=lambda place: units[place]["chain"]):
        places = list(of_chain)
        groups = [list(group) for _, group in groupby(places, key=row)]
        found.append((_prefix([units[place] for place in places]), groups))
    return found


def _element(unit: Unit) -> str:
    """The name of the element that a unit is, or is part of."""
    name: str = unit["name"]
    return name.removesuffix(_ending(unit["role"]))


def _ending(role: str) -> str:
    return "" if role == "block" else f".{role}"


def _prefix(units: Sequence[Unit]) -> str:
    """What the names of the units' elements begin with, all of them, up to a number: ``layer3.``, ``layers.layer_``."""
    elements = [_element(unit) for unit in units]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*elements, strict=False))
    prefix = "".join(letters[0] for letters in same).rstrip("0123456789")
    # A name without a number would be nothing but prefix.
    return prefix if prefix not in elements else f"{prefix.rpartition('.')[0]}."


def _label(units: Sequence[Unit], prefix: str) -> str:
    """``1 … 34 .conv2``: the elements of a row, without what the chain's names begin with, and their role."""
    first, last = (_element(unit).removeprefix(prefix) for unit in (units[0], units[-1]))
    role = _ending(units[0]["role"])
    elements = first if first == last else f"{first} … {last}{' ' if role else ''}"
    return f"  {elements}{role}"


def _short(number: int) -> str:
    """1.2M, 34k, 567."""
    for scale, letter in ((1_000_000, "M"), (1_000, "k")):
        if number >= scale:
            return f"{number / scale:.1f}{letter}" if number < 10 * scale else f"{number / scale:.0f}{letter}"
    return str(number)


def _mega(number: float) -> str:
    return f"{number / _MEGA:,.1f}"
