"""Commands of whoever signs: keys, publishing, withdrawing, permissions. They need no broker."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from pathlib import Path

from lamplighter_agent.package.manifest import UNKNOWN_LICENCE
from lamplighter_fleet.arguments import Commands, add_command, first_line, new_passphrase
from lamplighter_fleet.keys import PLACES, KeyDirectory, any_encrypted, create_keys
from lamplighter_fleet.publish import allow_downgrade, list_packages, publish_package, withdraw_package
from lamplighter_fleet.repository import Repository, Signed
from lamplighter_fleet.rotation import (
    RootChange,
    change_passphrase,
    list_keys,
    renew_root,
    revoke_key,
    rotate_key,
)


def add_commands(commands: Commands) -> None:
    """Add ``keys``, ``publish``, ``refresh``, ``packages``, ``withdraw`` and ``allow-downgrade``."""
    keys = commands.add_parser("keys", help="make, show, rotate and revoke signing keys")
    _add_keys(keys.add_subparsers(required=True, metavar="ACTION"))
    publishing = add_command(commands, "publish", publish, "put a package into a static repository and sign it")
    publishing.add_argument("package", type=Path, help="package directory")
    _add_repository(publishing)
    refresh = add_command(commands, "refresh", refresh_repository, "sign anew what expires soonest")
    _add_repository(refresh)
    packages = add_command(commands, "packages", show_packages, "list the packages that a repository offers")
    _add_repository(packages)
    withdraw = add_command(commands, "withdraw", withdraw_reference, "take a package off the list; devices keep theirs")
    withdraw.add_argument("reference", help="NAME/VERSION as published")
    _add_repository(withdraw)
    allow = add_command(
        commands, "allow-downgrade", permit_downgrade, "sign the permission to go back to a lower version"
    )
    allow.add_argument("reference", help="NAME/VERSION that devices may go back to")
    allow.add_argument("--from", dest="replaces", required=True, metavar="VERSION", help="the higher version")
    _add_repository(allow)


def _add_keys(actions: Commands) -> None:
    init = add_command(actions, "init", init_keys, "make the keys of a new repository and the root that devices trust")
    init.add_argument("directory", type=Path, help="new or empty directory for the keys")
    init.add_argument("--root-days", type=int, default=365, help="days until the root must be renewed (default: 365)")
    init.add_argument("--root-keys", type=int, default=1, help="keys that may sign a root (default: 1)")
    init.add_argument("--root-threshold", type=int, default=1, help="how many of them must (default: 1)")
    init.add_argument("--encrypt", action="store_true", help="ask for a passphrase (the default on a terminal)")
    init.add_argument("--plain", action="store_true", help="do not encrypt the offline keys")
    init.add_argument("--passphrase-file", type=Path, help="file whose first line encrypts the offline keys")
    show = add_command(actions, "show", show_keys, "list the keys that the newest root names, and where they are")
    rotate = add_command(actions, "rotate", rotate_named, "put a new key in the place of an old one")
    rotate.add_argument("role", choices=tuple(PLACES), help="whose key")
    rotate.add_argument("--key", metavar="ID", help="which one, where the role has several; its beginning will do")
    revoke = add_command(actions, "revoke", revoke_named, "take a key that got into wrong hands out of the root")
    revoke.add_argument("key", metavar="ID", help="which one; its beginning will do")
    renew = add_command(actions, "renew", prolong_root, "sign the same keys for longer, before the root expires")
    renew.add_argument("--days", type=int, default=365, help="days until it must be renewed again (default: 365)")
    apply = add_command(actions, "apply", apply_root, "bring a change of keys into the repository")
    passphrase = add_command(actions, "passphrase", new_encryption, "encrypt the offline keys with another passphrase")
    passphrase.add_argument("--new-passphrase-file", type=Path, help="file whose first line is the new one")
    passphrase.add_argument("--plain", action="store_true", help="do not encrypt them any more")
    for command in (show, rotate, revoke, renew, apply, passphrase):
        command.add_argument("--keys", type=Path, required=True, help="key directory made by 'keys init'")
        _add_passphrase(command)
    for command in (rotate, revoke, renew):
        command.add_argument("--repository", type=Path, help="bring the change into this repository at once")
    apply.add_argument("--repository", type=Path, required=True, help="directory that the web server shows")


def _add_passphrase(command: argparse.ArgumentParser) -> None:
    command.add_argument("--passphrase-file", type=Path, help="file whose first line opens the encrypted keys")
    command.add_argument("--ask-passphrase", action="store_true", help="ask for it on the terminal")


def _add_repository(command: argparse.ArgumentParser) -> None:
    command.add_argument("--repository", type=Path, required=True, help="directory that the web server shows")
    command.add_argument("--keys", type=Path, required=True, help="key directory made by 'keys init'")
    _add_passphrase(command)


def init_keys(arguments: argparse.Namespace) -> int:
    """Make the keys and the root of a new repository.

    Raises:
        LamplighterError: If the directory is in use or cannot be written.
    """
    passphrase = None
    if arguments.passphrase_file is not None:
        passphrase = first_line(arguments.passphrase_file).encode()
    elif arguments.encrypt or (sys.stdin.isatty() and not arguments.plain):
        passphrase = new_passphrase()
    created = create_keys(
        arguments.directory,
        passphrase=passphrase,
        root_days=arguments.root_days,
        root_keys=arguments.root_keys,
        root_threshold=arguments.root_threshold,
    )
    if arguments.json:
        print(json.dumps({"root": str(created.root), "key_ids": created.key_ids, "expires": str(created.expires)}))
        return 0
    print(f"{created.root}: the root, valid until {created.expires:%Y-%m-%d}; put it onto every device once")
    print(f"{', '.join(map(str, created.offline))}: keep these off the network; publishing needs the targets key")
    print(f"{', '.join(map(str, created.online))}: for the host that publishes and refreshes")
    if passphrase is None:
        print("The keys are not encrypted: 'keys passphrase' changes that.")
    return 0


def show_keys(arguments: argparse.Namespace) -> int:
    """List the keys and the root's expiry.

    Raises:
        LamplighterError: If the directory is not valid or a passphrase is wrong.
    """
    keys = _keys(arguments)
    root = keys.roots()[-1].signed
    states = list_keys(keys)
    if arguments.json:
        listed = [{"role": s.role, "id": s.key_id, "threshold": s.threshold,
                   "file": str(s.file) if s.file else None, "encrypted": s.encrypted} for s in states]  # fmt: skip
        print(json.dumps({"root_version": root.version, "expires": str(root.expires), "keys": listed}))
        return 0
    print(f"root {root.version}, valid until {root.expires:%Y-%m-%d}: renew it before then with 'keys renew'")
    for state in states:
        place = "not here" if state.file is None else f"{state.file}{'' if not state.encrypted else ' (encrypted)'}"
        print(f"{state.role:10} {state.key_id[:16]}  {state.threshold} must sign  {place}")
    return 0


def rotate_named(arguments: argparse.Namespace) -> int:
    """Replace a key.

    Raises:
        LamplighterError: If there is no such key, or the change cannot be signed or written.
    """
    keys = _keys(arguments)
    return _show_change(arguments, keys, rotate_key(keys, arguments.role, key_id=arguments.key))


def revoke_named(arguments: argparse.Namespace) -> int:
    """Take a key out.

    Raises:
        LamplighterError: If there is no such key, or the change cannot be signed or written.
    """
    keys = _keys(arguments)
    return _show_change(arguments, keys, revoke_key(keys, arguments.key))


def prolong_root(arguments: argparse.Namespace) -> int:
    """Prolong the root.

    Raises:
        LamplighterError: If it cannot be signed or written.
    """
    keys = _keys(arguments)
    return _show_change(arguments, keys, renew_root(keys, days=arguments.days))


def apply_root(arguments: argparse.Namespace) -> int:
    """Show the newest root in a repository and sign anew what old keys had signed.

    Raises:
        LamplighterError: If a key is not here, or the repository cannot be verified or written.
    """
    signed = Repository(arguments.repository, _keys(arguments)).take_over()
    if arguments.json:
        print(json.dumps({"applied": signed is not None}))
    elif signed is None:
        print("nothing is published there yet: the first publication brings the root along")
    else:
        print(_validity(signed))
    return 0


def new_encryption(arguments: argparse.Namespace) -> int:
    """Change the passphrase.

    Raises:
        LamplighterError: If a key cannot be opened or written.
    """
    passphrase = None
    if arguments.new_passphrase_file is not None:
        passphrase = first_line(arguments.new_passphrase_file).encode()
    elif not arguments.plain:
        passphrase = new_passphrase()
    files = change_passphrase(_keys(arguments), passphrase)
    if arguments.json:
        print(json.dumps({"files": list(map(str, files)), "encrypted": passphrase is not None}))
    else:
        print(f"{', '.join(map(str, files))}: {'not encrypted' if passphrase is None else 'encrypted anew'}")
    return 0


def publish(arguments: argparse.Namespace) -> int:
    """Publish a package.

    Raises:
        LamplighterError: If the package is not whole, or the repository cannot be signed or written.
    """
    done = publish_package(arguments.package, _repository(arguments), progress=_show_bytes)
    if done.licence == UNKNOWN_LICENCE:
        print(f"{done.reference} names no licence of the model ({UNKNOWN_LICENCE})", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"package": done.reference, "manifest_sha256": done.manifest_sha256,
                          "new_bytes": done.new_bytes, "reused_bytes": done.reused_bytes}))  # fmt: skip
    elif done.signed is None:
        print(f"{done.reference} was published before, just like this")
    else:
        print(f"{done.reference} is published: {done.new_bytes} new bytes, {done.reused_bytes} shared with others")
        print(_validity(done.signed))
    return 0


def refresh_repository(arguments: argparse.Namespace) -> int:
    """Renew the signatures that expire soonest.

    Raises:
        LamplighterError: If nothing is published or a key cannot be used.
    """
    signed = _repository(arguments).refresh()
    if arguments.json:
        print(json.dumps({"snapshot_expires": str(signed.snapshot_expires),
                          "timestamp_expires": str(signed.timestamp_expires)}))  # fmt: skip
    else:
        print(_validity(signed))
    return 0


def show_packages(arguments: argparse.Namespace) -> int:
    """List what a repository offers.

    Raises:
        LamplighterError: If its metadata cannot be trusted.
    """
    packages = list_packages(_repository(arguments))
    if arguments.json:
        print(json.dumps({"packages": [package.reference for package in packages]}))
    else:
        for package in packages:
            print(f"{package.reference:50} {package.manifest_sha256}")
    return 0


def withdraw_reference(arguments: argparse.Namespace) -> int:
    """Take a package off the list.

    Raises:
        LamplighterError: If it is not published, or a key cannot be used.
    """
    signed = withdraw_package(arguments.reference, _repository(arguments))
    if arguments.json:
        print(json.dumps({"withdrawn": arguments.reference}))
    else:
        print(f"{arguments.reference} is withdrawn: no device takes it up any more; where it runs, it goes on")
        print(_validity(signed))
    return 0


def permit_downgrade(arguments: argparse.Namespace) -> int:
    """Sign a permission.

    Raises:
        LamplighterError: If the package is not published, or a key cannot be used.
    """
    signed = allow_downgrade(arguments.reference, arguments.replaces, _repository(arguments))
    if arguments.json:
        print(json.dumps({"reference": arguments.reference, "from": arguments.replaces, "new": signed is not None}))
    elif signed is None:
        print("that was permitted before")
    else:
        print(f"devices on {arguments.replaces} may go back to {arguments.reference} when it is pushed to them")
        print(_validity(signed))
    return 0


def _show_change(arguments: argparse.Namespace, keys: KeyDirectory, change: RootChange) -> int:
    signed = None
    if arguments.repository is not None:
        signed = Repository(arguments.repository, keys).take_over()
    if arguments.json:
        print(json.dumps({"root_version": change.version, "removed": change.removed, "added": change.added,
                          "applied": signed is not None}))  # fmt: skip
        return 0
    print(f"root {change.version} is signed by the old and the new root keys; devices find it at their next check")
    for key_id in change.removed:
        print(f"{key_id[:16]}: counts no more")
    for key_id, file in zip(change.added, change.files, strict=True):
        print(f"{key_id[:16]}: new, in {file}; put it where the old one was, and make a copy for the safe")
    if signed is not None:
        print(f"the repository shows root {change.version}, and what the old key had signed is signed anew")
        print("if a targets key was stolen, look at the list for what its thief published: lamplighter-fleet packages")
    else:
        print("bring it into the repository: lamplighter-fleet keys apply --keys KEYS --repository DIR")
    return 0


def _keys(arguments: argparse.Namespace) -> KeyDirectory:
    if arguments.passphrase_file is not None:
        return KeyDirectory(arguments.keys, first_line(arguments.passphrase_file).encode())
    # Whoever sits at a terminal is asked; a job that runs by itself must say where the passphrase is.
    asks = arguments.run not in _ONLINE_ALONE and sys.stdin.isatty() and any_encrypted(arguments.keys)
    if arguments.ask_passphrase or asks:
        return KeyDirectory(arguments.keys, getpass.getpass("Passphrase of the offline keys: ").encode())
    return KeyDirectory(arguments.keys)


_ONLINE_ALONE = frozenset({refresh_repository, show_packages})
"""Commands that need no offline key."""


def _repository(arguments: argparse.Namespace) -> Repository:
    return Repository(arguments.repository, _keys(arguments))


def _show_bytes(done: int, total: int) -> None:
    if sys.stderr.isatty() and total:
        end = "\n" if done >= total else ""
        print(f"\rpublishing {done / total:4.0%}", file=sys.stderr, end=end, flush=True)


def _validity(signed: Signed) -> str:
    return f"signed until {signed.timestamp_expires:%Y-%m-%d}: run 'lamplighter-fleet refresh' before then"
