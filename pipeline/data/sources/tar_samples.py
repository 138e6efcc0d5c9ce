"""Members of a tar → inputs with their classes, by the rules of `keys`.

The companions of an image (`.cls`, `.json`, `.txt`, …) are no inputs. Every other member is one, also a class file of
no image, an image beside the image of its sample, and a junk file, each with the reason why it is no sample.
"""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, TypeAlias

import numpy as np

from pipeline.data.sources.inputs import BESIDE_IMAGE, LABEL_FILE, NO_LABEL, Entries, Rejection
from pipeline.data.sources.junk_files import is_junk
from pipeline.data.sources.keys import COMPANIONS, Group, Sample, group_members, kind, split, without_numbers
from pipeline.data.sources.labels.label_encoder import MAX_CLASSES, LabelEncoder
from pipeline.data.sources.labels.sample_label import MAX_LABEL_BYTES, is_class_text, read_label
from pipeline.errors import DataError
from pipeline.untrusted import printable

Member: TypeAlias = "tuple[str, int, int, int]"
"""Path, size, time of modification, and offset of the data or a key of `UNREADABLE`; a tuple, as there are millions."""
LINK, SPARSE, OTHER = -1, -2, -3
UNREADABLE = {
    LINK: "a link to no file of its archive",
    SPARSE: "a sparse member of its archive",
    OTHER: "a member of a kind that is not read, such as a part of a file in several volumes",
}
NOT_FILES = (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V", b"D", b"N")
"""Types of members that are not meant as files: directories, devices, and GNU tar's notes about the archive."""
_MAX_EXTENSIONS = 1 << 12


def label_encoder(archive: str) -> LabelEncoder:
    """An encoder for the labels of an archive's samples."""
    return LabelEncoder(archive, "sample", MAX_CLASSES)


class TarSamples:
    """Builds the entries of one tar.

    Args:
        file: the tar, unpacked.
        archive: its name in messages.
        labels: whether classes are wanted.
        image_extensions: as for `keys.group_members`.
        check_stop: called now and then; may raise.
    """

    def __init__(
        self,
        file: BinaryIO,
        archive: str,
        *,
        labels: bool,
        image_extensions: frozenset[str],
        check_stop: Callable[[], None],
    ) -> None:
        self._file, self._archive, self._labels_wanted, self._check_stop = file, archive, labels, check_stop
        self._image_extensions = image_extensions
        self._entries, self._codes = Entries(), array("q")
        self._encoder = label_encoder(archive)
        self._runs, self._run = array("q"), 0  # a run: consecutive members of one key
        self._orphans: dict[str, list[Member]] = {}  # companions that lie apart from any image of their key
        self._extensions: set[str] = set()  # of images
        self._unclear: set[str] = set()  # extensions of images that may be parts of their names

    def entries(self, members: Iterable[Member]) -> Entries:
        """Divide the members into inputs and companions.

        webdataset wants the members of a key together; members that lie apart are found, too.

        Raises:
            DataError: it is unclear what the class of an image is, or which image is the image of a sample.
        """
        for key, run in self._runs_of(members):
            self._add_run(key, run)
            self._run += 1
        self._join_scattered()
        if any(code != NO_LABEL for code in self._codes):
            codes = np.frombuffer(self._codes, np.int64)
            self._entries.labels, self._entries.classes = self._encoder.class_numbers(codes)
            self._entries.labels_from = ".cls or .json of the samples"
        return self._entries

    def _runs_of(self, members: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
        run_key, run = "", list[Member]()
        for number, member in enumerate(members):
            if number % 1024 == 0:
                self._check_stop()
            if is_junk(member[0]):
                self._add_input(member)
                continue
            key = split(member[0])[0]
            if key != run_key and run:
                yield run_key, run
                run = []
            run_key = key
            run.append(member)
        if run:
            yield run_key, run

    def _add_input(self, member: Member, code: int = NO_LABEL, rejection: Rejection | None = None) -> None:
        if member[3] < 0:
            rejection = Rejection("unreadable", UNREADABLE[member[3]])
        if rejection:
            self._entries.rejections[len(self._codes)] = rejection
        self._entries.add(*member)
        self._codes.append(code)
        self._runs.append(self._run)

    def _add_run(self, key: str, members: list[Member]) -> None:
        if len({member[0] for member in members}) < len(members):
            members = self._without_repeated(members)
        extensions = tuple(split(member[0])[1] for member in members)
        group = group_members(extensions, self._image_extensions)
        companions = {n for n, extension in enumerate(extensions) if kind(without_numbers(extension)) in COMPANIONS}
        self._refuse_unclear(group, members, bool(companions))
        codes = {sample.image: self._code(sample, members) for sample in group.samples}
        for number, member in enumerate(members):
            if number not in companions:
                rejection = Rejection(BESIDE_IMAGE) if number in group.beside else None
                self._add_input(member, codes.get(number, NO_LABEL), rejection)
        if len(self._extensions) < _MAX_EXTENSIONS:
            self._extensions.update(without_numbers(extensions[sample.image]) for sample in group.samples)
        if group.orphans:
            self._orphans.setdefault(key, []).extend(members[number] for number in group.orphans)

    def _without_repeated(self, members: list[Member]) -> list[Member]:
        """Without members that a later one of the same name replaces; companions stay, so that they are compared."""
        last = {member[0]: number for number, member in enumerate(members)}
        remaining = []
        for number, member in enumerate(members):
            if number == last[member[0]] or kind(member[0]).lower() in COMPANIONS:
                remaining.append(member)
            else:
                self._add_input(member)
        return remaining

    def _code(self, sample: Sample, members: list[Member]) -> int:
        """The label code of a sample."""
        if not self._labels_wanted or not sample.companions:
            return NO_LABEL

        def read(number: int) -> bytes:
            _, size, _, offset = members[number]
            if offset < 0:
                raise ValueError(f"it is {UNREADABLE[offset]}")
            self._file.seek(offset)
            return self._file.read(min(size, MAX_LABEL_BYTES + 1))

        paths = [member[0] for member in members]
        label = read_label(sample, paths, read, self._archive)
        return NO_LABEL if label is None else self._encoder.code(label, paths[sample.image])

    def _refuse_unclear(self, group: Group, members: list[Member], has_companions: bool) -> None:
        """Refuse several images of one name if it is unclear which of them is the sample.

        Without companions, and if no other key has the same extensions, the extensions are taken for parts of names:
        `john.smith.png`, `john.doe.png`.
        """
        for unclear in group.unclear:
            paths = [members[number][0] for number in unclear]
            rests = [without_numbers(split(path)[1]) for path in paths]
            if has_companions or not self._unclear.isdisjoint(rests):
                one, other = paths[:2]
                raise DataError(
                    f"{printable(self._archive)}: {printable(one)} and {printable(other)} may be an image and what "
                    f"lies beside it, or two images: --image-ext {printable(rests[0])} takes the one, --image-ext "
                    f"{printable(rests[0])},{printable(rests[1])} both"
                )
            self._unclear.update(rest for rest in rests if "." in rest)

    def _join_scattered(self) -> None:
        """Divide again the members of each key that do not follow each other."""
        groups: dict[str, list[int]] = {}
        is_mixed = len(self._extensions) > 1 and any("." in extension for extension in self._extensions)
        if is_mixed or self._orphans:
            for number, path in enumerate(self._entries.paths):
                key = split(path)[0]
                if (is_mixed or key in self._orphans) and not is_junk(path):
                    groups.setdefault(key, []).append(number)
        for key, numbers in groups.items():
            if key in self._orphans or len({self._runs[number] for number in numbers}) > 1:
                self._join(key, numbers)
        self._add_orphans()

    def _join(self, key: str, numbers: list[int]) -> None:
        last = {self._entries.paths[number]: number for number in numbers}
        numbers, entries, orphans = list(last.values()), self._entries, self._orphans.pop(key, [])
        members = [(entries.paths[i], entries.sizes[i], entries.stamps[i], entries.offsets[i]) for i in numbers]
        members += orphans
        group = group_members(tuple(split(member[0])[1] for member in members), self._image_extensions)
        has_labels = any(self._codes[number] != NO_LABEL for number in numbers)
        self._refuse_unclear(group, members, bool(orphans) or has_labels)
        for beside in group.beside:
            entries.rejections.setdefault(numbers[beside], Rejection(BESIDE_IMAGE))
        for sample in group.samples:
            entry = numbers[sample.image]
            code, earlier = self._code(sample, members), self._codes[entry]
            if NO_LABEL not in (code, earlier) and code != earlier:
                raise DataError(
                    f"{printable(self._archive)}: {printable(entries.paths[entry])} is class "
                    f"{self._encoder.text(earlier)} by one member and {self._encoder.text(code)} by another: keep one, "
                    "or give --labels none"
                )
            if code != NO_LABEL:
                self._codes[entry] = code
        if remaining := [members[number] for number in group.orphans]:
            self._orphans[key] = remaining

    def _add_orphans(self) -> None:
        """Make inputs of the companions of no image."""
        orphans = [member for members in self._orphans.values() for member in members]
        class_files = [member[0] for member in orphans if is_class_text(member[0])]
        if self._labels_wanted and class_files and all(code == NO_LABEL for code in self._codes):
            raise DataError(
                f"{printable(self._archive)}: no image belongs to {printable(class_files[0])}, nor to any other of its "
                f"{len(class_files)} class files: give them the names of the images, or give --labels none"
            )
        for member in orphans:
            rejection = Rejection(LABEL_FILE, "of no image") if is_class_text(member[0]) else None
            self._add_input(member, rejection=rejection)
