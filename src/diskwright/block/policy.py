"""Which of an image's outside references may be opened.

A hostile image can name any file of the machine as its backing file. So every reference goes
through a policy, and whoever opens an image chooses it.
"""

from __future__ import annotations

import os

from diskwright.errors import PolicyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Policy:
    """Decides by rule; subclasses override `refusal`."""

    def refusal(self, role: str, reference: str, image: str) -> str | None:
        """Why `image` may not have `reference` opened as its `role`, or None if it may.

        Args:
            role: "backing file", "data file" or what else the format calls it.
            reference: the name, already made relative to the image.
            image: the image's own file name.
        """
        return None

    def require(self, role: str, reference: str, image: str) -> None:
        """Raise PolicyError where the reference is refused."""
        reason = self.refusal(role, reference, image)
        if reason is not None:
            raise PolicyError(
                f"The {role} '{reference}' of '{image}' was not opened: {reason}",
                path=image,
                hint="allow it with policy=diskwright.FollowAll() or --allow-references "
                "if you trust the image",
            )


class FollowAll(Policy):
    """Follows every reference, as QEMU's tools do."""


class FollowNothing(Policy):
    """Opens nothing but the image."""

    def refusal(self, role: str, reference: str, image: str) -> str | None:
        """Always a reason."""
        return "outside references are not followed here"


class SameFolder(Policy):
    """Follows references to files in or below the image's own folder; the library's default."""

    def refusal(self, role: str, reference: str, image: str) -> str | None:
        """A reason for whatever is not a plain file in or below the image's folder."""
        name = reference.removeprefix("file:")
        if reference.startswith("json:") or "://" in reference or ":" in name.split("/")[0]:
            return "it is not a plain file name"
        folder = os.path.realpath(os.path.dirname(os.path.abspath(image)))
        target = os.path.realpath(name)
        if os.path.commonpath((folder, target)) != folder:
            return f"it lies outside of the image's folder {folder}"
        if os.path.exists(target) and not os.path.isfile(target):
            return "it is not a regular file"
        return None


class Ask(Policy):
    """Asks a callable, which gets (role, reference, image) and answers yes or no."""

    def __init__(self, question: Callable[[str, str, str], bool]) -> None:
        self._question = question

    def refusal(self, role: str, reference: str, image: str) -> str | None:
        """The answer of the callable."""
        return None if self._question(role, reference, image) else "it was answered with no"
