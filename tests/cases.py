"""One test that loops over cases names the one that fails."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def case(*named: object) -> Iterator[None]:
    """Around one turn of the loop; a failure inside is reported with these names."""
    try:
        yield
    except BaseException as error:  # pytest's own failures are no Exceptions
        error.add_note(f"case: {', '.join(map(str, named))[:300]}")
        raise
