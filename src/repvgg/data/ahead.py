"""Groups of images that are fetched before they are needed, so that no one waits for a network."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from repvgg.data.order import WINDOW
from repvgg.data.store import ShardError


@contextlib.contextmanager
def fetched_ahead(fetch: Callable[[int], object], groups: Sequence[int]) -> Iterator[None]:
    """While the context lasts, fetch groups in the background, in this order.

    As many are on their way at a time as are needed at a time, so that a server that is slow to
    answer is asked for the next before it has given the last.

    Args:
        fetch: brings a group here; safe with many threads at once.
        groups: their numbers.
    """
    waiting, ended = iter(groups), threading.Event()
    turn = threading.Lock()

    def work() -> None:
        while not ended.is_set():
            with turn:
                group = next(waiting, None)
            if group is None:
                return
            # Whoever needs the group fails in the same way, and says so.
            with contextlib.suppress(ShardError):
                fetch(group)

    # Daemons: a process that ends does not wait for what nobody needs any more.
    for _ in range(min(WINDOW, len(groups))):
        threading.Thread(target=work, name="fetch ahead", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
