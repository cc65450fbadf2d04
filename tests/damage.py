"""Damaged files, and what may come of reading them."""

import warnings


def outcome(function, *names):
    """What a function returns, or None after an error that names one of the files."""
    raised = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage and goes on
        try:
            return function()
        except (ValueError, OSError) as error:
            raised = error
    assert type(raised) in (ValueError, OSError, FileNotFoundError, IsADirectoryError, NotADirectoryError), raised
    assert any(name in str(raised) for name in names), f"{raised} names none of {names}"
    assert len(str(raised)) < 1000
    return None


def mutations(content, rng, count):
    """Bytes that are cut, changed, repeated or random."""
    for _ in range(count):
        damaged = bytearray(content)
        kind = rng.integers(5)
        place, length = int(rng.integers(len(content))), int(rng.integers(1, 9))
        if kind == 0:
            damaged = damaged[:place]
        elif kind == 1:
            damaged[place : place + length] = rng.bytes(length)
        elif kind == 2:
            damaged[place:place] = rng.bytes(length)
        elif kind == 3:
            del damaged[place : place + length]
        else:
            damaged = rng.bytes(place)
        yield bytes(damaged)
