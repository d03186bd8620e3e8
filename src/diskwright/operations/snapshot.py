"""Internal snapshots: list, create, apply, delete."""

from __future__ import annotations

from diskwright.block.cancel import cancellable
from diskwright.block.info import SnapshotInfo
from diskwright.errors import (
    DiskwrightError,
    IOFailure,
    NotFoundError,
    OptionError,
    UnsupportedError,
    strerror_of,
)
from diskwright.operations.opening import Image, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name

LIST = "list"
CREATE = "create"
APPLY = "apply"
DELETE = "delete"

#: Bytes of a name that QEMU keeps and looks for.
LONGEST_NAME = 255


def snapshot_image(
    image: Image,
    action: str,
    tag: str = "",
    *,
    opened: Callable[[Node], None] | None = None,
) -> list[SnapshotInfo]:
    """Open an image, do one thing with its snapshots, and list those it has then.

    Args:
        image: which.
        action: LIST, CREATE, APPLY or DELETE.
        tag: the name of the new one, or of the one to delete; to apply, an id or else a name.
        opened: gets the node before anything is changed (a command warns about guesses).

    Raises:
        NotFoundError: there is no such snapshot.
        UnsupportedError: the format has none.
    """
    with open_image(image, read_only=action == LIST) as node:
        if opened is not None:
            opened(node)
        if action == CREATE:
            create_snapshot(node, tag)
        elif action == APPLY:
            apply_snapshot(node, tag)
        elif action == DELETE:
            delete_snapshot(node, tag)
        return node.snapshots()


def create_snapshot(node: Node, name: str) -> SnapshotInfo:
    """Keep the present content of `node` under `name`, at this time.

    Raises:
        OptionError: the name is longer than LONGEST_NAME: QEMU would not find it.
    """
    from time import time_ns

    try:
        length = len(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise OptionError(f"No snapshot can be called {name!a}", field="create") from None
    if length > LONGEST_NAME:
        raise OptionError(
            f"The name of a snapshot has at most {LONGEST_NAME} bytes, not {length}",
            field="create",
        )

    now = time_ns()
    wanted = SnapshotInfo(
        "", name, date_seconds=now // 10**9, date_nanoseconds=now % 10**9, disk_size=node.size
    )
    wanted.icount = 0
    try:
        if not node.can_snapshot:
            raise UnsupportedError(
                f"The {node.driver} format keeps no snapshots", qemu="Operation not supported"
            )
        return node.snapshot_create(wanted)
    except DiskwrightError as error:
        if isinstance(error, IOFailure):
            error.qemu = strerror_of(error)  # all that QEMU says of it
        error.within(f"Could not create snapshot '{name}'")
        raise


def apply_snapshot(node: Node, tag: str) -> None:
    """Go back to the snapshot with the id or else name `tag`; what came after is lost."""
    sentence = f"Could not apply snapshot '{tag}'"
    if not node.can_snapshot:
        raise UnsupportedError(
            f"{sentence}: the {node.driver} format keeps no snapshots",
            qemu=f"{sentence}: Block driver does not support snapshots",
        )
    if node.dirty_bitmaps():
        raise UnsupportedError(
            f"{sentence}: Device has active dirty bitmaps",
            hint="what they noted would be wrong: remove them before",
        )
    try:
        node.check_snapshots()
    except DiskwrightError as error:
        raise error.within(f"{sentence}: Failed to load snapshot") from None
    if find(node, tag) is None:
        raise NotFoundError(
            f"{sentence}: there is none of that id or name",
            qemu=f"{sentence}: Failed to load snapshot: No such file or directory",
            errno=2,
        )
    try:
        node.snapshot_apply(tag)
    except DiskwrightError as error:
        error.within(sentence)
        raise


def delete_snapshot(node: Node, tag: str) -> None:
    """Remove the first snapshot of the name `tag`.

    Ids do not count, as for QEMU's tool: a script that means a name must not lose another
    snapshot that happens to have it for its number.
    """
    sentence = f"Could not delete snapshot '{tag}'"
    found = find_named(node, tag) if node.can_snapshot else None
    if found is None:
        raise NotFoundError(
            f"{sentence}: there is none of that name",
            qemu=f"{sentence}: snapshot not found",
            errno=2,
        )
    try:
        node.snapshot_delete(found.id)
    except DiskwrightError as error:
        error.within(sentence)
        raise


def find(node: Node, tag: str) -> SnapshotInfo | None:
    """The snapshot with the id `tag`, or else the first of that name, or None."""
    for found in node.snapshots():
        if found.id == tag:
            return found
    return find_named(node, tag)


def find_named(node: Node, name: str) -> SnapshotInfo | None:
    """The first snapshot of this name, or None."""
    for found in node.snapshots():
        if found.name == name:
            return found
    return None


def find_by_words(node: Node, wanted: str) -> SnapshotInfo | None:
    """As `find`, where `wanted` may also be QEMU's "snapshot.id=…,snapshot.name=…".

    Raises:
        OptionError: other words are among those.
    """
    if not wanted.startswith("snapshot."):
        return find(node, wanted)
    words = snapshot_words(wanted)
    id, tag = words.get("snapshot.id"), words.get("snapshot.name")
    for found in node.snapshots():
        if id in (None, found.id) and tag in (None, found.name):
            return found
    return None


def snapshot_words(wanted: str) -> dict[str, object]:
    """QEMU's "snapshot.id=…,snapshot.name=…" as a dict.

    Raises:
        OptionError: other words are among those.
    """
    from diskwright.block.options import split_words, words_as_dict

    words = words_as_dict(split_words(wanted))
    for name in words:
        if name not in ("snapshot.id", "snapshot.name"):
            error = OptionError(f"Invalid parameter '{name}'", field="snapshot")
            error.then = f"Failed in parsing snapshot param '{wanted}'"
            raise error
    return words


def open_at(node: Node, image: Image, wanted: str) -> Node:
    """The image opened anew at one of its snapshots; closes `node`.

    Args:
        node: the image, open.
        image: how it was opened.
        wanted: as for `find_by_words`.

    Raises:
        UnsupportedError: the format keeps no snapshots.
        NotFoundError: there is no such one.
    """
    sentence = "Failed to load snapshot"
    if "snapshot" not in node.options:
        raise UnsupportedError(
            f"{sentence}: the {node.driver} format has none",
            qemu=f"{sentence}: Block format '{node.driver}' used by device '' does not support "
            "temporarily loading internal snapshots",
        )
    found = find_by_words(node, wanted)
    if found is None:
        raise NotFoundError(
            f"{sentence}: there is none that is called '{wanted}'",
            qemu=f"{sentence}: Can't find snapshot",
            errno=2,
        )
    format = node.driver
    node.close()
    again = Image(
        image.name,
        format=format,
        options={**image.options, "snapshot": found.id},
        cache=image.cache,
        force_share=image.force_share,
        policy=image.policy,
        shown=image.title,
    )
    again.refusal = sentence
    return open_image(again)


def snapshot(
    name: Name,
    *,
    create: str | None = None,
    apply: str | None = None,
    delete: str | None = None,
    format: str | None = None,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> list[SnapshotInfo]:
    """List an image's internal snapshots, after one was created, applied or deleted.

    Args:
        name, format, policy: as for `diskwright.info`.
        create: the name of a new one.
        apply: the id or else name of the one to go back to; what came after it is lost.
        delete: the name of the one to remove; ids do not count.
        cancel: a `threading.Event` or the like that ends it; the image is
            as it was then.

    Raises: as `snapshot_image`, and CancelledError if the flag was set.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("kept.qcow2", "1M", format="qcow2")
        >>> [kept.name for kept in diskwright.snapshot("kept.qcow2", create="before")]
        ['before']
        >>> diskwright.snapshot("kept.qcow2", delete="before")
        []
    """
    wanted = [
        (action, tag)
        for action, tag in ((CREATE, create), (APPLY, apply), (DELETE, delete))
        if tag is not None
    ]
    if len(wanted) > 1:
        raise OptionError("Only one of create, apply and delete can be asked for", field="create")
    action, tag = wanted[0] if wanted else (LIST, "")
    if not isinstance(tag, str):
        raise OptionError(
            f"A snapshot is named by text, not by an object of type {type(tag).__name__}",
            field=action,
        )
    with cancellable(cancel):
        return snapshot_image(Image(name, format=format, policy=policy), action, tag)
