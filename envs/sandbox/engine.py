"""The images of a Docker engine: which one a base is, and how it gets there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.errors import InfraError, Unsupported
from envs.sandbox.archives import offered
from envs.sandbox.bases import Base, is_archive, layer_names
from envs.sandbox.hostbase import skeleton, skeleton_name
from envs.sandbox.imagestore import docker_archive, image_layers


def engine_image(client: Any, name: str, base: Base) -> Any:
    """The engine's image that has the layers of `base`."""
    import docker

    found = [name] if not is_archive(name) else []
    if is_archive(name) or offered(name):
        found += [entry["Id"] for entry in client.api.images()]
    for known in found:
        with contextlib.suppress(docker.errors.ImageNotFound):  # removed meanwhile
            image = client.images.get(known)
            if layer_names(image) == base.layers[1:]:
                return image
    if layout := offered(name):
        return _loaded(client, layout, name)
    if not is_archive(name):
        raise Unsupported(f"base={name!r}: the name has been given to another image meanwhile; start again")
    raise Unsupported(
        f"base={name!r}: the engine has no image of these layers; docker load -i {name} (a plain root file system: docker"
        f" import {name} NAME, and base='NAME'), or use the native backend"
    )


def _loaded(client: Any, layout: Path, name: str) -> Any:
    """Load an image of a layout into the engine. It is asked without the layers that it has, then, if it minds, with all."""
    import docker

    wanted = image_layers(layout, name)
    chains = [client.images.get(entry["Id"]).attrs["RootFS"].get("Layers") or [] for entry in client.api.images()]
    shared = max((_shared(wanted, chain) for chain in chains), default=0)
    for skip in dict.fromkeys((shared, 0)):
        with contextlib.suppress(docker.errors.APIError, docker.errors.ImageLoadError):
            return client.images.load(docker_archive(layout, name, skip))[0]
    raise InfraError(f"base={name!r}: the engine can't load it; see its log")


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many of the first elements are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def host_image(client: Any, uid: int) -> Any:
    """The skeleton that the host's own files are mounted over; imported at first use, a few kilobytes."""
    import docker

    name, _, tag = skeleton_name().partition(":")
    try:
        image = client.images.get(skeleton_name())
        image.tag(name, tag)  # says that it is in use: see `reaper.images`
    except docker.errors.ImageNotFound:
        client.api.import_image_from_data(skeleton(uid), repository=name, tag=tag)
        image = client.images.get(skeleton_name())
    return image
