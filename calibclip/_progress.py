"""A progress bar for those who ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from calibclip._checks import check_flag


@contextmanager
def progress_bar(
    show: bool, total: int | None, title: str, unit: str
) -> Iterator[Callable[[int], object]]:
    """Open a bar and yield the function that moves it on; without ``show`` it does nothing."""
    check_flag("progress", show)
    if not show:
        yield lambda count: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm; pip install tqdm") from error
    with tqdm(total=total, desc=title, unit=unit) as bar:
        yield bar.update
