"""Where reports go that no place was given for: beside the draft, but never into the Hub's cache.

What lies in that cache is the Hub's: it is shared, is deleted when room is needed, and nobody looks
for a report there.
"""

import os
import pathlib


def report_folder(draft: str | os.PathLike[str], directory: pathlib.Path) -> pathlib.Path:
    """The default folder of a draft's report.

    Args:
        draft: as the user named it: a folder, or a name on the Hub.
        directory: where it lies, for a draft of the Hub in the cache.

    Returns:
        The draft's own folder, or ``outputs/NAME`` for one of the Hub, as for a draft that is made.
    """
    draft = pathlib.Path(draft)
    return directory if draft.is_dir() else pathlib.Path("outputs", draft.name).absolute()
