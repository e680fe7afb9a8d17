"""Which byte may come next in UTF-8, so that what is written always decodes.

The table of well-formed byte sequences of the Unicode standard (table 3-7): after its first byte a
character needs one to three more, and only the second one may have a narrower range.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qll.errors import TextError

CONTINUATION = (0x80, 0xBF)
# range of first bytes -> bytes still needed, range of the second byte
FIRST_BYTES = {
    (0x00, 0x7F): (0, CONTINUATION),
    (0xC2, 0xDF): (1, CONTINUATION),
    (0xE0, 0xE0): (2, (0xA0, 0xBF)),
    (0xE1, 0xEC): (2, CONTINUATION),
    (0xED, 0xED): (2, (0x80, 0x9F)),
    (0xEE, 0xEF): (2, CONTINUATION),
    (0xF0, 0xF0): (3, (0x90, 0xBF)),
    (0xF1, 0xF3): (3, CONTINUATION),
    (0xF4, 0xF4): (3, (0x80, 0x8F)),
}


@dataclass(frozen=True)
class Utf8State:
    """Where a sequence of bytes stands: between characters, or inside one.

    >>> state = Utf8State().after(0xE2)
    >>> state.needed, state.allowed(10)[0x82], state.allowed(10)[0x41]
    (2, True, False)
    """

    needed: int = 0
    """Bytes that the character still needs; 0 between characters."""
    low: int = CONTINUATION[0]
    high: int = CONTINUATION[1]

    def after(self, byte: int) -> Utf8State:
        """The state after `byte`; raises TextError for one that cannot come here."""
        if self.needed:
            if self.low <= byte <= self.high:
                return Utf8State(self.needed - 1)
        else:
            for (low, high), (needed, second) in FIRST_BYTES.items():
                if low <= byte <= high:
                    return Utf8State(needed, *second)
        raise TextError("not valid UTF-8", where="the bytes", found=f"byte 0x{byte:02x}")

    def allowed(self, remaining: int) -> tuple[bool, ...]:
        """Whether each of the 256 bytes may come next, and its character end in `remaining` bytes.

        The bytes of a character that has begun are allowed whatever remains.
        """
        return _allowed(self, min(remaining, 4))


def state_after(text: bytes) -> Utf8State:
    """The state at the end of `text`; raises TextError when it is not UTF-8.

    >>> state_after("caf\\u00e9".encode()[:-1]).needed
    1
    """
    # earlier characters do not matter: decode them at once, and walk through the last
    end = len(text)
    while end > max(0, len(text) - 4) and text[end - 1] & 0xC0 == 0x80:
        end -= 1
    end = max(0, end - 1)
    try:
        text[:end].decode()
    except UnicodeDecodeError as error:
        raise TextError(
            "not valid UTF-8", where=f"byte {error.start}", found=f"0x{text[error.start]:02x}"
        ) from None
    state = Utf8State()
    for byte in text[end:]:
        state = state.after(byte)
    return state


@lru_cache
def _allowed(state: Utf8State, remaining: int) -> tuple[bool, ...]:
    if state.needed:
        return tuple(state.low <= byte <= state.high for byte in range(256))
    needed = dict.fromkeys(range(256), 4)
    for (low, high), (more, _) in FIRST_BYTES.items():
        needed |= dict.fromkeys(range(low, high + 1), more)
    return tuple(needed[byte] < remaining for byte in range(256))
