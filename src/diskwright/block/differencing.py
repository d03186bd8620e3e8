"""What every format whose images name a parent by its identifier asks of one."""

from __future__ import annotations

from diskwright.errors import OptionError


def require_fit(
    path: str, title: str, *, parent: tuple[object, int] | None, own: tuple[object, int]
) -> None:
    """Refuse what an image is to have as its parent from now on, if it cannot be that.

    Args:
        path: of the parent.
        title: of the format.
        parent: its identifier, and the bytes of its disk; None if it is of another format.
        own: those of the image.

    Raises:
        OptionError: it is no image of the format, the image itself, or of another size.
    """
    if parent is None:
        raise OptionError(f"'{path}' is no {title} image, as a parent must be", field="backing")
    if parent[0] == own[0]:
        raise OptionError("An image cannot be its own parent", field="backing")
    if parent[1] != own[1]:
        raise OptionError(
            f"The parent has {parent[1]} bytes, the image {own[1]}: they must be alike",
            field="backing",
        )
