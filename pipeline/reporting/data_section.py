"""The section of the page on the images that a run was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.reporting.data_facts import DataFacts
from pipeline.reporting.markup import paragraph, table, text
from pipeline.reporting.run_facts import RunFacts

_CLASSES = 30


def of_sets(sets: Sequence[DataFacts], run: RunFacts) -> str:
    """The shard sets: training data, then validation data; or why there are none to show."""
    if sets:
        return "".join(_set(facts, validation=i > 0) for i, facts in enumerate(sets))
    return paragraph(
        "The run does not say what its network was trained on: it was imported."
        if run.imported is not None
        else "The run names no shard set."
    )


def _set(facts: DataFacts, *, validation: bool) -> str:
    title = f"<h3>{'Validation' if validation else 'Training'} data: <code>{text(facts.url)}</code></h3>"
    if facts.problem:
        return title + paragraph(f"The shard set cannot be read from here: {facts.problem}.")
    size = f"{facts.bytes / 1e6:,.1f} MB" if facts.bytes < 1e9 else f"{facts.bytes / 1e9:,.1f} GB"
    line = f"{facts.images:,} images of {facts.shape}, {size}"
    line += f", from {facts.source}." if facts.source else "."
    if facts.sizes:
        sides = ", ".join(
            f"{least} to {2 * int(least) - 1} px: {n:,}" for least, n in facts.sizes.items() if least.isdigit()
        )
        line += f" Short side of the originals: {sides}."
    if facts.transforms:
        line += f" Done to them: {', '.join(f'{name} {n:,}' for name, n in facts.transforms.items())}."
    return f"{title}{paragraph(line)}{_classes(facts)}{_rejected(facts)}"


def _classes(facts: DataFacts) -> str:
    if facts.classes is None:
        return paragraph("The images have no classes.")
    most = max(facts.classes.values(), default=0) or 1
    rows = "".join(
        f"<tr><td>{text(name)}</td><td class=n>{count:,}</td>"
        f'<td class=wide><span class="bar" style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for name, count in list(facts.classes.items())[:_CLASSES]
    )
    more = len(facts.classes) - _CLASSES
    rest = paragraph(f"And {more:,} more classes.") if more > 0 else ""
    head = "<tr><th>class</th><th class=n>images</th><th class=wide></th></tr>"
    return f'<div class="scroll classes"><table>{head}{rows}</table></div>{rest}'


def _rejected(facts: DataFacts) -> str:
    if not facts.rejected:
        return paragraph("No input was rejected.")
    rows = [
        ((reason, facts.meaning(reason)), f"{count:,}", ", ".join(facts.examples.get(reason, ())))
        for reason, count in facts.rejected.items()
    ]
    return paragraph("Inputs that were rejected:") + table(("reason", "inputs", "such as"), rows, (1,))
