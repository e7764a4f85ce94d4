"""``snapshot``."""

from __future__ import annotations

from ..errors import DiskError, NoSuchSnapshot
from ..hints import TYPE_CHECKING
from .images import arguments, look, one_operand, run, spec, warn_if_guessed
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, QUIET, Opt
from .output import Call, UsageProblem, reason

if TYPE_CHECKING:
    from ..engine.kernel import BaseDriver
    from ..ops.images import ImageSpec

OPTIONS = (
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    FORCE_SHARE,
    OBJECT,
    Opt("l", "list", "", "list the snapshots (what is done when nothing is said)"),
    Opt("c", "create", "SNAPSHOT", "take a snapshot of this name"),
    Opt("a", "apply", "SNAPSHOT", "make the disk what it was then (by id or name)"),
    Opt("d", "delete", "SNAPSHOT", "give up the snapshot of this name"),
    *GATE,
)
_ACTIONS = ("list", "create", "apply", "delete")


def main(call: Call, argv: list[str]) -> int:
    """List, take, apply or delete internal snapshots."""
    args = arguments(
        call, argv, OPTIONS, "FILENAME", "List, take, apply or delete an image's own snapshots."
    )
    if args is None:
        return 0
    given = [key for key, _ in args.options if key in _ACTIONS]
    if len(given) > 1:
        raise UsageProblem("Cannot mix '-l', '-a', '-c', '-d'")
    image = spec(args, one_operand(args))
    action = given[0] if given else "list"
    if action == "list":
        return look(lambda driver: _list(call, driver, image))
    name = args.get(action) or ""
    return run(lambda driver: _change(call, driver, image, action, name))


async def _list(call: Call, driver: BaseDriver, image: ImageSpec) -> int:
    from ..ops.images import close_all
    from ..ops.snapshots import listed
    from .snapshot_list import snapshot_lines

    node = await image.open(driver, backing=False)
    try:
        found = listed(node)
    finally:
        await close_all([node])
    call.quiet = False
    if found:
        call.out("\n".join(snapshot_lines(found)))
    return 0


async def _change(
    call: Call, driver: BaseDriver, image: ImageSpec, action: str, name: str
) -> int:
    from ..graph.closing import discard_disk
    from ..ops.images import close_all
    from ..ops.snapshots import Selector, apply, create, delete

    node = await image.open(driver, writable=True, backing=False, resize=action == "apply")
    try:
        warn_if_guessed(call, image.name, node)
        try:
            if action == "create":
                await create(node, name)
            elif action == "apply":
                await apply(node, Selector(either=name))
            else:
                await delete(node, Selector(name=name))
        except NoSuchSnapshot:
            why = (
                "snapshot not found"
                if action == "delete"
                else "Failed to load snapshot: No such file or directory"
            )
            raise call.fail(f"Could not {action} snapshot '{name}': {why}") from None
        except (OSError, DiskError) as error:
            raise call.fail(f"Could not {action} snapshot '{name}': {reason(error)}") from error
    except BaseException:
        await discard_disk(node)
        raise
    await close_all([node])
    return 0
