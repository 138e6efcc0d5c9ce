"""Files that operating systems, file managers and version control leave behind, and no user means as images."""

from __future__ import annotations

import re
from functools import lru_cache

_DIRECTORY = re.compile(
    r"__MACOSX|\.AppleD(ouble|esktop)|\.DocumentRevisions-V100|\.Spotlight-V100|\.TemporaryItems|\.fseventsd|\.Trashes"
    r"|\.Trash(-.*)?|\.thumbnails|@eaDir|\.@__thumb|@Recycle|#recycle|#snapshot|\.snapshot|lost\+found"
    r"|\$RECYCLE\.BIN|RECYCLER|System Volume Information|\.ipynb_checkpoints|__pycache__|\.git|\.svn|\.hg"
    r"|CVS|\.cache|\.dropbox\.cache|\.idea|\.vscode|\.dvc|\.stversions|\.stfolder",
    re.DOTALL,
)
_FILE = re.compile(
    r"\._.*|\.DS_Store|\.localized|Icon\r|\.apdisk|\.VolumeIcon\.icns|\.com\.apple\..*"
    r"|(?i:thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db|desktop\.ini|\.?picasa\.ini)|.*:Zone\.Identifier"
    r"|.*@Syno(EAStream|Resource)|\.directory|\.nfs[0-9a-f]{16,}|\.fuse_hidden[0-9a-f]+|\.~lock\..*#"
    r"|\.git(keep|ignore|attributes|modules)|\.dropbox(\.attr)?|\.stignore|\..*\.sw[a-p]|.*~",
    re.DOTALL,
)


def is_junk(path: str) -> bool:
    """Whether a path, relative to its source, is a junk file or lies in a junk directory."""
    directory, _, name = path.rpartition("/")
    return _FILE.fullmatch(name) is not None or _is_in_junk(directory)


@lru_cache(maxsize=1024)
def _is_in_junk(directory: str) -> bool:
    return any(map(_DIRECTORY.fullmatch, directory.split("/")))
