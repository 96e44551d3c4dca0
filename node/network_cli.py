"""The commands around networks that one can share: `covey network new` and `show`, `covey invite`, `covey join`.

Belongs here: their options, what they ask and what they print. A task file that comes with a network is code: it is shown,
and never run before the user has said so.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from rich.markup import escape

from node import api
from node.addresses import check_free, dialable
from node.cli_common import (
    DEFAULT_HOME,
    Home,
    Json,
    Options,
    Protocol,
    Settings,
    TaskName,
    check_rule,
    err,
    out,
    plain,
    print_json,
    run_node,
    settings_of,
)
from node.config import CONFIG_FILE, Config, Setting, load_config, parse_config
from node.core import LEARNING
from node.first_config import first_config
from node.founding import (
    bind,
    check_stopped,
    check_unbound,
    find_task_file,
    known_bootstrap,
    make_manifest,
    network_of,
    schema_of_task,
)
from node.identity import KEY_FILE, create_key, load_key
from node.invitation import (
    PREFIX,
    TASK_IN_LINK_BYTES,
    Link,
    decode_link,
    encode_link,
    invite,
    load_admission,
    make_holder,
    use_link,
)
from node.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_TASK_BYTES,
    TASK_FILE,
    Manifest,
    check_task_code,
    is_shared,
    manifest_toml,
    read_bounded,
    read_manifest,
)
from node.signatures import Ed25519Signatures, author_of, peer_of_author
from protocols.admission import AdmissionPolicy, refusal
from protocols.errors import ConfigError, LocalError
from protocols.view import NO_LEARNING
from protocols.vocabulary import MAX_ADDRESSES, Reason

DAYS = 7
MAX_DAYS = 36_500
MAX_LINES_SHOWN = 300

network_app = typer.Typer(no_args_is_help=True, help="Make a network that others can join, or look at one.")

Source = Annotated[
    str, typer.Argument(help="A link of `covey invite`, or a manifest file.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands to `covey`."""
    app.add_typer(network_app, name="network")
    app.command("invite")(invite_command)
    app.command("join")(join_command)


# --- covey network new ----------------------------------------------------------------------------------
@network_app.command("new")
def new(
    home: Home = DEFAULT_HOME,
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default="the task's name")] = None,
    task: TaskName = None,
    protocol: Protocol = None,
    option: Options = None,
    own_option: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of the task that each device sets for itself, by its name; may be repeated."
        ),
    ] = None,
    set_: Settings = None,
    private: Annotated[bool, typer.Option("--private", help="Only whom you invite may join.")] = False,
    member: Annotated[
        list[str] | None,
        typer.Option(help="A peer id that may join without invitation; makes it private; may be repeated."),
    ] = None,
    inviter: Annotated[
        list[str] | None,
        typer.Option(help="A peer id that may invite, beside yours; makes it private; may be repeated."),
    ] = None,
    psk: Annotated[
        bool, typer.Option("--psk", help="A secret in every link hides the network from all others.")
    ] = False,
    bootstrap: Annotated[
        list[str] | None, typer.Option(help="A peer that newcomers ask first; may be repeated.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="Write the manifest here too, to be passed on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a network of this home's settings: a signed manifest, which this home then keeps to.

    What is given here goes on top of the home's config. This runs the task, to learn its schema.
    """
    told = settings_of(task, protocol, option, set_)
    config = _config_for_new(home, told)
    for each in own_option or ():
        if each not in config.task.options:
            raise ConfigError(
                "--own-option", f"'{each}' is no option that is set here", sorted(config.task.options)
            )
    task_file = find_task_file(config.task.name, [Path.cwd(), home] if task else [home])
    code = None if task_file is None else read_bounded(task_file, MAX_TASK_BYTES)
    _check_targets(target, code)
    key = _key_of(home)
    signatures = Ed25519Signatures(key)
    only_invited = private or member or inviter
    me = peer_of_author(signatures.author)
    manifest = make_manifest(
        config,
        name or (config.task.name if task_file is None else task_file.stem),
        schema_of_task(config, home, task_file),
        code,
        signatures,
        bootstrap=bootstrap or (),
        members=member or (),
        inviters=[me, *(inviter or ())] if only_invited else (),
        own_options=own_option or (),
    )
    own = [Setting(("network", "psk"), secrets.token_hex(32))] if psk else []
    own += [
        Setting(("task", "options", each), config.task.options[each])
        for each in own_option or ()
        if each in config.task.options
    ]
    bind(home, manifest, code, [*_device_settings(manifest.protocol, told), *own], os.environ).write(
        home, None
    )
    if target is not None:
        target.write_text(manifest_toml(manifest), encoding="utf-8")
        if code is not None:
            target.with_name(TASK_FILE).write_bytes(code)
    if as_json:
        print_json(
            {"network": manifest.network, "home": str(home), "peer": me, "private": not manifest.is_open}
        )
        return
    _say(escape(f"Network {manifest.network}\nHome    {home}\nMaker   {me}\n"))
    _say(escape(f"Start it with: covey run --home {home}\nInvite others: covey invite --home {home}"))


def _config_for_new(home: Path, told: Sequence[Setting]) -> Config:
    bound = network_of(home)
    if bound is not None:
        raise LocalError(f"{home} belongs to the network '{bound.network}' already; choose another --home")
    if (home / CONFIG_FILE).exists():
        config = load_config(home, os.environ, told)
    else:
        protocol = next((each.value for each in told if each.path == ("learning", "protocol")), "gossip")
        config = parse_config(first_config(protocol, told), os.environ)
    if not config.learns:
        learning = [each for each in LEARNING if each != NO_LEARNING]
        raise ConfigError("learning.protocol", "a network has to learn something", learning)
    check_rule(config)
    return config


def _check_targets(target: Path | None, code: bytes | None) -> None:
    """Nothing of somebody's is overwritten."""
    if target is None:
        return
    if target.exists():
        raise LocalError(f"{target} exists already; choose another --out")
    beside = target.with_name(TASK_FILE)
    if code is not None and beside.exists() and read_bounded(beside, MAX_TASK_BYTES) != code:
        raise LocalError(f"{beside} exists and is another file; choose another folder for --out")


def _device_settings(protocol: str, told: Sequence[Setting]) -> list[Setting]:
    """Of what was told, what no manifest decides: it stays in the home's own config."""
    return [
        each
        for each in told
        if not is_shared(protocol, *each.path[:2])
        and (each.path[0] != "task" or each.path[1] in ("shard", "probe"))
    ]


def _key_of(home: Path) -> Any:
    """The home's key; both are made where there are none."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError(f"{home} cannot be made: {error.strerror}") from error
    return load_key(home / KEY_FILE) if (home / KEY_FILE).exists() else create_key(home / KEY_FILE)


# --- covey network show ---------------------------------------------------------------------------------
@network_app.command("show")
def show(
    source: Annotated[
        str | None,
        typer.Argument(help="A manifest file or a link.", show_default="the manifest of the home"),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Check a network's manifest or link, and say all that it holds. Nothing of it is run."""
    if source is None:
        manifest = network_of(home)
        if manifest is None:
            raise LocalError(
                f"{home} belongs to no network with a manifest; make one with `covey network new`"
            )
        offer = Offer(Link(manifest=manifest), home)
    else:
        offer = _read_offer(source)
    if as_json:
        print_json(msgspec.to_builtins(offer.link.manifest))
    else:
        for line in _description(offer.link, None):
            _say(line)


class Offer(NamedTuple):
    """What was read, and the folder in which a task file may lie beside it."""

    link: Link
    folder: Path | None


def _read_offer(source: str) -> Offer:
    """A link, a file that holds one, or a manifest file; checked."""
    if source.strip().startswith("covey:"):
        return Offer(decode_link(source), None)
    path = Path(source).expanduser()
    if not _exists(path):
        raise ConfigError(source[:80], "is no file, and no link", [f"{PREFIX}…", "the path of a manifest"])
    if path.is_dir():
        raise ConfigError(source, "is a folder; name the manifest in it")
    content = read_bounded(path, MAX_MANIFEST_BYTES * 4)
    if content.lstrip().startswith(b"covey:"):
        return Offer(decode_link(content.decode(errors="replace")), None)
    return Offer(Link(manifest=read_manifest(path)), path.parent)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a link without its beginning is too long for a name
        return False


def _description(link: Link, code: bytes | None) -> Iterator[str]:
    manifest = link.manifest
    task = manifest.task
    rows = [("Network", manifest.network), ("Maker", manifest.maker)]
    if task.sha256 is None:
        rows.append(("Task", f"{task.name}, which comes with covey"))
    else:
        rows.append(("Task", f"{task.name}: CODE that comes with the network, SHA-256 {task.sha256}"))
    rows += [("Option", f"{name} = {value!r}") for name, value in task.options.items()]
    rows += [("Seed", str(task.seed)), ("Schema", task.schema), ("Protocol", manifest.protocol)]
    for label, tables in (("Shared", manifest.shared), ("Advice", manifest.suggested)):
        for table, settings in tables.items():
            rows += [(label, f"{table}.{name} = {value!r}") for name, value in settings.items()]
    rows += [("Joins", line) for line in _who_joins(manifest, link)]
    rows += [("Ask", address) for address in (*link.bootstrap, *manifest.bootstrap)]
    for label, value in rows:
        yield f"[bold]{label:9}[/bold] {escape(plain(value))}"
    if code is not None:
        yield from _listing(code)


def _who_joins(manifest: Manifest, link: Link) -> Iterator[str]:
    if manifest.is_open:
        yield "anyone" + (" who has the secret" if link.psk else "")
        return
    for title, peers in (("member", manifest.members), ("may invite", manifest.inviters)):
        yield from (f"{title} {peer}" for peer in peers)
    if link.invitation is not None:
        holder = "whoever has this link" if link.holder_key else peer_of_author(link.invitation.holder)
        yield f"invited: {holder}, {_until(link.invitation.expires_at)}"


def _listing(code: bytes) -> Iterator[str]:
    lines = code.decode(errors="replace").splitlines()
    yield f"\n[bold]{TASK_FILE}[/bold], {len(code)} bytes:"
    # What came in a link lies nowhere else where it could be read.
    shown = lines if len(code) <= TASK_IN_LINK_BYTES else lines[:MAX_LINES_SHOWN]
    yield from ("  | " + escape(plain(line)) for line in shown)
    if len(lines) > len(shown):
        yield f"  … and {len(lines) - len(shown)} lines more: read the file itself"


def _until(expires_at: int) -> str:
    if not expires_at:
        return "without end"
    return f"until {datetime.fromtimestamp(min(expires_at, _LAST_SHOWN), UTC):%Y-%m-%d %H:%M} UTC"


_LAST_SHOWN = 253402300799
"""The last second of the year 9999."""


# --- covey invite ---------------------------------------------------------------------------------------
def invite_command(
    home: Home = DEFAULT_HOME,
    peer: Annotated[
        str | None,
        typer.Option("--for", help="The peer id that is invited; left out, whoever has the link is."),
    ] = None,
    days: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_DAYS,
            help="Days until an invitation into a private network ends; 0 is never.",
            show_default=f"{DAYS}; with --for 0",
        ),
    ] = None,
    qr: Annotated[
        bool | None,
        typer.Option("--qr/--no-qr", help="Draw the link as a QR code too.", show_default="on a terminal"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a link with which others join this home's network. The link goes to the output, the rest beside it.

    An invitation is needed as long as its peer takes part: after its end no new connection is made with it.
    """
    config = load_config(home)
    manifest = network_of(home)
    if manifest is None:
        raise LocalError(f"{home} belongs to no network with a manifest; make one with `covey network new`")
    signatures = Ed25519Signatures(load_key(home / KEY_FILE))
    if days is None:
        days = 0 if peer else DAYS
    expires_at = int((datetime.now(UTC) + timedelta(days=days)).timestamp()) if days else 0
    bound, holder_key = _invitation(manifest, signatures, peer, expires_at)
    code = None
    if manifest.task.sha256 is not None:
        code = read_bounded(home / TASK_FILE, MAX_TASK_BYTES)
    link = Link(
        manifest=manifest,
        bootstrap=_own_addresses(home, config, peer_of_author(signatures.author)),
        task_file=code if code is not None and len(code) <= TASK_IN_LINK_BYTES else None,
        invitation=bound,
        holder_key=holder_key,
        psk=bytes.fromhex(config.network.psk) if config.network.psk else None,
    )
    text = encode_link(link)
    if as_json:
        print_json(
            {
                "link": text,
                "characters": len(text),
                "network": manifest.network,
                "for": peer,
                "expires_at": bound.expires_at if bound else 0,
                "addresses": list(link.bootstrap),
                "task_file": link.task_file is not None,
            }
        )
        return
    typer.echo(text)
    for line in _about(link, text, code):
        _note(line)
    if qr or (qr is None and sys.stdout.isatty()):
        _draw(text)


def _invitation(
    manifest: Manifest, signatures: Ed25519Signatures, peer: str | None, expires_at: int
) -> tuple[Any, bytes | None]:
    """The invitation, and the private key of its holder where that is in the link; neither for an open network."""
    try:
        holder = None if peer is None else author_of(peer)
    except ValueError as error:
        raise ConfigError("--for", str(error), ["a peer id, as printed by `covey init`"]) from error
    if manifest.is_open:
        return None, None
    if peer_of_author(signatures.author) not in manifest.inviters:
        who = ", ".join(manifest.inviters) or "nobody: its members are listed"
        raise LocalError(f"this node may not invite into '{manifest.network}'; who may: {who}")
    if holder is not None:
        return invite(manifest.network, holder, expires_at, signatures), None
    key = make_holder()
    holder = Ed25519Signatures(key).author
    return invite(manifest.network, holder, expires_at, signatures), key.private_bytes_raw()


def _own_addresses(home: Path, config: Config, me: str) -> tuple[str, ...]:
    """Where this node can be dialled, and whom it asks itself.

    Raises:
        LocalError: no address is known.
    """
    try:
        found = list(api.call(home, "/status")["addresses"])
    except LocalError:
        own = config.network.announce or dialable(config.network.listen)
        found = [f"{address}/p2p/{me}" for address in own if "/tcp/0" not in address]
        if found:
            _note("note: the node does not run; newcomers need it, or another that does")
    found += [address for address in config.network.bootstrap if address not in found]
    if not found:
        raise LocalError(
            "no address is known at which this node can be dialled; start it with "
            f"`covey run --home {home}`, or set network.announce"
        )
    return tuple(found[:MAX_ADDRESSES])


def _about(link: Link, text: str, code: bytes | None) -> Iterator[str]:
    yield f"{len(text)} characters, network {link.manifest.network}"
    if link.invitation is not None:
        until = _until(link.invitation.expires_at)
        if link.holder_key is None:
            yield f"It invites {peer_of_author(link.invitation.holder)} alone, {until}."
        else:
            yield f"Whoever has it may join, {until}: pass it on in secret."
    if link.psk is not None:
        yield "It holds the network's secret: pass it on in secret."
    if code is not None and link.task_file is None:
        yield f"{TASK_FILE} is too long for a link ({len(code)} bytes): pass it on too, for `covey join --task-file`."


def _draw(text: str) -> None:
    import segno

    try:
        code = segno.make_qr(text, error="l")
    except segno.DataOverflowError:
        _note("The link is too long for a QR code.")
        return
    width, columns = code.symbol_size(border=2)[0], shutil.get_terminal_size().columns
    if width > columns:
        _note(f"The QR code needs {width} columns, and the terminal has {columns}.")
        return
    code.terminal(out=sys.stderr, border=2, compact=True)


# --- covey join -----------------------------------------------------------------------------------------
def join_command(
    source: Source,
    home: Home = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    listen: Annotated[
        str | None, typer.Option(help="Where to listen.", show_default="/ip4/0.0.0.0/tcp/4001")
    ] = None,
    task_file: Annotated[
        Path | None, typer.Option(help="The network's task file, where the link has no room for it.")
    ] = None,
    option: Options = None,
    set_: Settings = None,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Make the home ready, and leave it at that.")
    ] = False,
) -> None:
    """Join a network: check the link or manifest, show what it will run here, ask, make the home, run the node."""
    offer = _read_offer(source)
    link, manifest = offer.link, offer.link.manifest
    check_unbound(home, manifest.network)
    check_stopped(home)
    _check_expiry(link)
    code = _task_code(offer, task_file)
    settings = [*_link_settings(home, link, listen), *settings_of(None, None, option, set_)]
    binding = bind(home, manifest, code, settings, os.environ)
    if not no_run:
        _check_ports(binding.config)
    for line in _description(link, code):
        _say(line)
    if not yes:
        _ask("\nJoin this network" + (", and run this code here?" if code else "?"))
    signatures = Ed25519Signatures(_key_of(home))
    me = peer_of_author(signatures.author)
    admission = use_link(link, signatures, me) or load_admission(home)
    _check_admitted(binding.config.admission_policy, manifest, signatures, admission)
    binding.write(home, admission)
    _check_schema(binding.config, home)
    _say(escape(f"\nHome      {home}\nPeer      {me}\nStart it with: covey run --home {home}"))
    if not no_run:
        run_node(load_config(home), home)


def _ask(question: str) -> None:
    try:
        typer.confirm(question, abort=True)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(error.__context__, EOFError) and not sys.stdin.isatty():
            raise LocalError("nobody is here to answer; --yes joins without the question") from None
        raise


def _check_ports(config: Config) -> None:
    for address in config.network.listen:
        try:
            check_free(address)
        except LocalError as error:
            raise LocalError(f"{error}: choose another with --listen") from error


def _check_expiry(link: Link) -> None:
    invitation = link.invitation
    if invitation is not None and 0 < invitation.expires_at <= datetime.now(UTC).timestamp():
        raise LocalError(
            f"the invitation was good {_until(invitation.expires_at)}; ask for a new one with `covey invite`, or set "
            "this device's clock if it is wrong"
        )


def _task_code(offer: Offer, task_file: Path | None) -> bytes | None:
    """The network's task file, as pinned; None where the task comes with covey."""
    manifest = offer.link.manifest
    if manifest.task.sha256 is None:
        if task_file is not None:
            raise ConfigError(
                "--task-file", f"'{manifest.network}' learns '{manifest.task.name}', which needs none"
            )
        return None
    if task_file is None and offer.link.task_file is not None:
        return offer.link.task_file
    path = task_file or (offer.folder / TASK_FILE if offer.folder else None)
    if path is None or not path.exists():
        where = f", and there is none at {path}" if path else ""
        raise ConfigError(
            "--task-file",
            f"the network's task file does not come with this{where}; get it from whoever invited you",
        )
    code = read_bounded(path, MAX_TASK_BYTES)
    check_task_code(manifest, code, str(path))
    return code


def _link_settings(home: Path, link: Link, listen: str | None) -> list[Setting]:
    found = []
    bootstrap = list(link.bootstrap)
    if (home / CONFIG_FILE).exists():
        known = known_bootstrap(home)
        bootstrap += [each for each in known if each not in (*bootstrap, *link.manifest.bootstrap)]
    if bootstrap:
        found.append(Setting(("network", "bootstrap"), bootstrap))
    if listen is not None:
        found.append(Setting(("network", "listen"), [listen]))
    if link.psk is not None:
        found.append(Setting(("network", "psk"), link.psk.hex()))
    return found


def _check_admitted(
    policy: AdmissionPolicy, manifest: Manifest, signatures: Ed25519Signatures, admission: Any
) -> None:
    """What others will say of this node in the handshake, said before."""
    me = peer_of_author(signatures.author)
    now = datetime.now(UTC).timestamp()
    found = refusal(policy, manifest.network, me, admission, now, signatures)
    if found is None:
        return
    reason, sentence = found
    if reason is Reason.FORGED:
        raise LocalError(f"{sentence}; ask for another link")
    who = " or ".join(manifest.inviters) or f"its maker {manifest.maker}"
    raise LocalError(
        f"the network '{manifest.network}' is private, and this node, {me}, is not invited ({sentence}); ask {who} "
        f"for a link made with `covey invite --for {me}`"
    )


def _check_schema(config: Config, home: Path) -> None:
    """With the user's consent the task is made; others would refuse this node if it came out otherwise than theirs."""
    manifest = network_of(home)
    assert manifest is not None
    if not config.learns:
        return
    task_file = (home / TASK_FILE).resolve() if manifest.task.sha256 is not None else None
    found = schema_of_task(config, home, task_file)
    if found != manifest.task.schema:
        raise LocalError(
            f"the task makes another model here than in the network (schema {found[:12]}, there "
            f"{manifest.task.schema[:12]}): its data or options differ; see `covey network show`, and correct "
            f"{home / CONFIG_FILE}"
        )


def _note(line: str) -> None:
    """Beside the output, which a pipe may take."""
    err.print(escape(line), highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)
