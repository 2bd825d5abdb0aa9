"""The smallest members of a changing set whose keys only ever rise. Knows nothing about experts or why keys rise."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container

Key = tuple[float, int]
SPARE = 16  # entries of members that left, beyond which (and as many as there are members) all of them are dropped


class RisingHeap:
    """A heap that is not told when a key rises: an entry is put right when it comes up.

    So a rise costs nothing, and looking for the smallest costs O(log S) for each that is found or was outdated. An
    entry is put right at most once after each rise.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Key, int, int]] = []  # (key when last seen, serial number, member)
        self._serial: dict[int, int] = {}  # of the entry of each member; other entries are of members that left
        self._added = 0

    def __len__(self) -> int:
        return len(self._serial)

    def add(self, member: int, key: Key) -> None:
        self._added += 1
        self._serial[member] = self._added
        heapq.heappush(self._entries, (key, self._added, member))

    def remove(self, member: int) -> None:
        self._serial.pop(member, None)  # an interrupt may have taken it out already
        if len(self._entries) > 2 * len(self._serial) + SPARE:
            self._entries = [x for x in self._entries if self._serial.get(x[2]) == x[1]]
            heapq.heapify(self._entries)

    def smallest(self, n: int, key_of: Callable[[int], Key], but: Container[int] = ()) -> list[int]:
        """The `n` members with the smallest keys, the smallest first, `but` left out; fewer if there are fewer."""
        entries = self._entries
        found: list[int] = []
        passed: list[tuple[Key, int, int]] = []
        while entries and len(found) < n:
            key, serial, member = entries[0]
            if self._serial.get(member) != serial:
                heapq.heappop(entries)
            elif key != (now := key_of(member)):
                heapq.heapreplace(entries, (now, serial, member))
            else:
                passed.append(heapq.heappop(entries))
                if member not in but:
                    found.append(member)
        for entry in passed:
            heapq.heappush(entries, entry)
        return found

    def pop_below(self, limit: float, key_of: Callable[[int], Key]) -> list[int]:
        """Remove and return every member whose key is at most `limit`."""
        entries, found = self._entries, []
        while entries and entries[0][0][0] <= limit:
            _, serial, member = entries[0]
            if self._serial.get(member) != serial:
                heapq.heappop(entries)
            elif (now := key_of(member))[0] > limit:
                heapq.heapreplace(entries, (now, serial, member))
            else:
                heapq.heappop(entries)
                del self._serial[member]
                found.append(member)
        return found

    def rebuild(self, key_of: Callable[[int], Key]) -> None:
        """Keys have changed in another way than by rising."""
        self._entries = [(key_of(member), serial, member) for member, serial in self._serial.items()]
        heapq.heapify(self._entries)
