"""Names by which columns of tables, fields of JSON and arrays are recognized: images, file names, labels. Pure."""

from __future__ import annotations

from collections.abc import Sequence

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "png", "bytes", "image_bytes", "data")
"""Columns of image bytes in Parquet tables, most likely first."""
FILE_NAME_COLUMNS = (
    "filename file_name file file_path filepath path image image_path image_name image_id img image name id".split()  # noqa: SIM905
)
"""Columns of file names, most likely first."""
CERTAIN_LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Columns of labels in Parquet tables, most likely first; a table that has one of these is searched no further."""
LABEL_COLUMNS = (
    "label class category target labels label_name class_name class_id category_id level diagnosis breed y "  # noqa: SIM905
    "class_label cls label_id".split()
)
"""Columns of labels, most likely first."""
JSON_LABEL_FIELDS = (
    "label", "class", "category", "cls", "labels", "label_name", "class_name", "label_id", "class_id", "category_id",
    "fine_label", "target",
)  # fmt: skip
"""Fields of a sample's `.json` that hold its class; the first that exists counts."""


def normalized(name: str) -> str:
    """The name in the form in which it is compared: `Label Name` becomes `label_name`."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def find_column(columns: Sequence[str], known: Sequence[str]) -> int | None:
    """Position of the column with the most likely of the `known` names; None if there is none."""
    names = list(map(normalized, columns))
    return next((names.index(name) for name in known if name in names), None)
