"""Finds the uses of the state of an engine by threads that do not hold its lock."""

from collections.abc import Callable, Container, Iterator
from typing import Any

from app.engine.engine import Engine

# The attributes of Engine that one thread sets and others read without the lock (see app/engine/engine.py).
USABLE = {"beat", "models", "clip", "clip_evaluations", "device_memory"}
READABLE = {"_condition", "_metrics", "_watchdog_seconds", "capacity", "feed", "loop", "ready"}  # they do not change
READABLE |= {"_state", "_num_steps", "_is_stopping"}


class LockGuard:
    """Checks each use of an attribute of the engine, its admission, its backlogs and their batches.

    `violations` has the names of the attributes that were used without the lock. The lists and dicts of a backlog are
    checked too, because code can keep a reference to them. Create it before the engine starts.
    """

    def __init__(self, engine: Engine) -> None:
        admission = engine._admission
        self._is_owned: Callable[[], bool] = engine._condition._is_owned  # type: ignore[attr-defined]
        self.violations: set[str] = set()
        for backlog in (engine._backlog, engine._background):
            backlog.jobs = self._container(list, "jobs", "__delitem__", "insert")
            backlog.with_previews = self._container(dict, "with_previews", "__delitem__", "__setitem__", "items", "pop")
            for each in (backlog.batch, backlog):
                self._watch(each)
        self._watch(admission.background_steps)
        self._watch(admission)
        self._watch(engine, readable=READABLE | USABLE, writable=USABLE)

    def _check(self, name: str) -> None:
        if not self._is_owned():
            self.violations.add(name)

    def _watch(self, target: Any, readable: Container[str] = (), writable: Container[str] = ()) -> None:
        kind, names, check = type(target), vars(target).keys() | (), self._check

        class Watched(kind):  # type: ignore[valid-type, misc]
            def __getattribute__(self, name: str) -> Any:
                if name in names and name not in readable:
                    check(f"{kind.__name__}.{name}")
                return super().__getattribute__(name)

            def __setattr__(self, name: str, value: object) -> None:
                if name not in writable:
                    check(f"{kind.__name__}.{name}")
                super().__setattr__(name, value)

        target.__class__ = Watched

    def _container(self, kind: type, name: str, *methods: str) -> Any:
        """Returns an empty container that checks its uses, also between two values of an iteration."""
        check = self._check

        class Watched(kind):  # type: ignore[valid-type, misc]
            def __iter__(self) -> Iterator[Any]:
                check(name)
                for value in super().__iter__():
                    yield value
                    check(name)

        def watched(method: str) -> Callable[..., Any]:
            def use(container: Any, *arguments: Any) -> Any:
                check(name)
                return getattr(kind, method)(container, *arguments)

            return use

        for method in ("__contains__", "__getitem__", "__len__", *methods):
            setattr(Watched, method, watched(method))
        return Watched()
