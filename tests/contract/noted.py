"""What a node's dirty bitmaps must have noted: a list of granules beside each of them."""

from __future__ import annotations

from diskwright.block.node import Node


class Model:
    """One bitmap: a byte that is 1 for each granule that was written to."""

    def __init__(self, grain: int, size: int, *, enabled: bool = True) -> None:
        self.grain = grain
        self.enabled = enabled
        self.granules = bytearray(-(-size // grain))

    def touch(self, offset: int, length: int) -> None:
        """Note a range, whether or not it notes writes."""
        first, stop = offset // self.grain, -(-(offset + length) // self.grain)
        stop = min(stop, len(self.granules))
        self.granules[first:stop] = b"\1" * max(stop - first, 0)

    def runs(self, size: int) -> list[tuple[int, int]]:
        """(offset, length) of what is noted, in bytes of a disk of `size`."""
        found: list[tuple[int, int]] = []
        start = None
        for number, value in enumerate([*self.granules, 0]):
            if value and start is None:
                start = number * self.grain
            elif not value and start is not None:
                found.append((start, min(number * self.grain, size) - start))
                start = None
        return found


class Noted:
    """Changes bitmaps of a node and of the model alike; `verify` compares."""

    def __init__(self, node: Node) -> None:
        self.size = node.size
        self.models = {
            info.name: Model(info.granularity, node.size, enabled=info.enabled)
            for info in node.dirty_bitmaps()
        }

    def touch(self, offset: int, length: int) -> None:
        """A request has changed a range of the disk."""
        for model in self.models.values():
            if model.enabled and length:
                model.touch(offset, length)

    def resize(self, size: int) -> None:
        """The disk has another size: what is new is not noted."""
        self.size = size
        for model in self.models.values():
            count = -(-size // model.grain)
            model.granules = model.granules[:count].ljust(count, b"\0")

    def change(self, node: Node, what: str, number: int, grain: int) -> None:
        """Do one thing to a bitmap: the one of that number, or a new one."""
        names = sorted(self.models)
        if what == "add":
            name = next(name for name in "abcdefgh" if name not in self.models)
            node.bitmap_add(name, granularity=grain, enabled=bool(number % 2))
            self.models[name] = Model(grain, self.size, enabled=bool(number % 2))
            return
        if not names:
            return
        name = names[number % len(names)]
        model = self.models[name]
        if what == "remove":
            node.bitmap_remove(name)
            del self.models[name]
        elif what == "clear":
            node.bitmap_clear(name)
            model.granules = bytearray(len(model.granules))
        elif what == "merge":
            source = names[(number + 1) % len(names)]
            node.bitmap_merge(name, node.dirty_bitmap(source))
            for offset, length in self.models[source].runs(self.size):
                model.touch(offset, length)
        else:
            model.enabled = what == "enable"
            node.bitmap_enable(name, model.enabled)

    def verify(self, node: Node) -> None:
        """Compare all bitmaps."""
        found = {info.name: info for info in node.dirty_bitmaps()}
        assert sorted(found) == sorted(self.models)
        for name, model in self.models.items():
            info, bitmap = found[name], node.dirty_bitmap(name)
            assert not info.inconsistent, name
            assert (info.granularity, info.enabled) == (model.grain, model.enabled), name
            assert list(bitmap.runs()) == model.runs(self.size), name
