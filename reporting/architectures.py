"""The networks of the runs as PyTorch prints them, layer by layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.gan import GENERATORS, Critic, Discriminator
from models.nets import NETS
from models.network import shapes_only
from reporting.output import Output
from reporting.tables import METHODS


def network_of(output: Output, run: str, what: str) -> tuple[str, str] | None:
    """The network in the file of a run, with a title; None if it is not there."""
    config = output.metadata(f"{run}/model.safetensors")
    if "net" not in config:
        return None
    try:
        with shapes_only():
            if config["net"] == "clip":
                import open_clip

                net = open_clip.CLIP(**config["arguments"])
            else:
                net = NETS[config["net"]](**config["arguments"])
    except Exception as error:  # wrong types in a file can raise anything
        reason = f"its configuration builds no network ({type(error).__name__})"
        output.note_broken(f"network: {what}", f"{run}/model.safetensors: {reason}", reason)
        return None
    return printed(net, what)


def gan_networks(output: Output) -> list[tuple[str, str]]:
    """The networks of both GANs, of which the files have the generators alone."""
    found = []
    for method, name in METHODS.items():
        arguments = output.arguments(f"p1/{method}")
        if not arguments:
            continue
        try:
            nets = both_players(method, arguments)
        except Exception as error:  # wrong types in a file can raise anything
            reason = f"its arguments build no network ({type(error).__name__})"
            output.note_broken(f"networks: {method}", f"p1/{method}/config.json: {reason}", reason)
            continue
        found += [printed(net, name) for net in nets]
    return found


def both_players(method: str, arguments: dict[str, Any]) -> list[nn.Module]:
    """The generator and its opponent, without memory for the weights."""
    width = arguments["width"]
    with shapes_only():
        generator = GENERATORS[arguments.get("net", "generator")](width=width)
        if method == "dcgan":
            return [generator, Discriminator(width)]
        options = {key: arguments[key] for key in ("norm", "spectral") if key in arguments}
        return [generator, Critic(width, **options)]


def printed(net: nn.Module, what: str) -> tuple[str, str]:
    """A network's title, with its number of parameters, and its layers."""
    count = sum(parameter.numel() for parameter in net.parameters())
    return f"{type(net).__name__} of {what}: {count:,} parameters", str(net)
