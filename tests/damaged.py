"""Files as a failing disk, a full one, or a careless hand leaves them."""

from __future__ import annotations

from hypothesis import strategies as st


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """The content with some byte changed, or cut off somewhere, or with zeros from there on."""
    at = data.draw(st.integers(0, len(content) - 1), "at")
    how = data.draw(st.sampled_from(["changed", "cut", "zeros"]), "how")
    if how == "cut":
        return content[:at]
    if how == "zeros":
        return content[:at] + bytes(len(content) - at)
    other = data.draw(st.integers(1, 255), "by")
    return content[:at] + bytes([content[at] ^ other]) + content[at + 1 :]
