"""What is done with dirty bitmaps while the power fails; see scenarios.py."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.crash.scenarios import Scene


def bitmaps(scene: Scene) -> None:
    """Bitmaps come, are changed and go, with writes between."""
    guest = scene.guest

    def some_writes() -> None:
        for number in scene.chance.sample(range(scene.units - 1), 3):
            guest.write(*scene.some(number))
        guest.discard(*scene.all(scene.chance.randrange(scene.units - 1)))
        guest.flush()

    guest.bitmap_add("first", 512)
    guest.bitmap_add("idle", 4096, enabled=False)
    some_writes()
    guest.bitmap_add("second", 1024)
    some_writes()
    guest.bitmap_merge("idle", "first")
    guest.bitmap_clear("first")
    some_writes()
    guest.bitmap_enable("second", False)
    guest.bitmap_enable("idle", True)
    some_writes()
    guest.bitmap_merge("second", "idle")
    guest.bitmap_remove("first")
    some_writes()
    guest.bitmap_enable("idle", False)
    guest.bitmap_clear("second")
    guest.bitmap_remove("second")


def filled_and_noted(scene: Scene) -> None:
    """A disk with bitmaps, one of which notes nothing."""
    scene.guest.bitmap_add("noting", 512)
    for number in range(scene.units * 2 // 3):
        scene.guest.write(*scene.all(number))
    scene.guest.bitmap_add("idle", 65536, enabled=False)
    scene.guest.bitmap_merge("idle", "noting")


def filled_and_cleared(scene: Scene) -> None:
    """A full disk with a bitmap that has forgotten all writes to it."""
    filled_and_noted(scene)
    scene.guest.bitmap_clear("noting")


def filled_and_idle(scene: Scene) -> None:
    """A full disk with a bitmap that notes nothing."""
    scene.guest.bitmap_add("idle", 512, enabled=False)
    for number in range(scene.units * 2 // 3):
        scene.guest.write(*scene.all(number))


def grown_over_a_table(scene: Scene) -> None:
    """The disk becomes longer, and shorter, than a bitmap's table is for."""
    guest, cluster = scene.guest, scene.node.cluster_size
    one_entry = cluster * 8 * 512  # bytes of the disk, by the granularity of 512
    for size in (one_entry + scene.variant.size, scene.variant.size):
        guest.resize(size)
        guest.write(*scene.some(1))
        guest.flush()


def handled(scene: Scene) -> None:
    """The disk is at rest: bitmaps are changed without a write, then the image is closed."""
    guest = scene.guest
    guest.bitmap_clear("noting")
    guest.bitmap_add("more", 2048)
    guest.bitmap_merge("more", "idle")
    guest.bitmap_enable("idle", True)
    guest.bitmap_enable("noting", False)
    guest.bitmap_remove("more")
