"""Judgements of a host's network: what the variables name is there and up, and nothing much faster lies idle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bloomery.cluster.doctor.facts import Facts, Interface
from bloomery.cluster.doctor.finding import Answer, good
from bloomery.cluster.doctor.needs import Needs


@dataclass(frozen=True)
class Named:
    """What a variable names. `whole`: names as they are; else also beginnings of them."""

    names: tuple[str, ...] = ()
    whole: bool = False

    def there(self, name: str, have: Iterable[str]) -> list[str]:
        """What it means of what is there: what is called so, before what only begins so."""
        exact = [one for one in have if _means(name, one, whole=True)]
        return exact or [one for one in have if not self.whole and _means(name, one, whole=False)]

    def dead(self, up: Mapping[str, bool]) -> list[str]:
        """Names with nothing behind them that is up."""
        return [name for name in self.names if not any(up[one] for one in self.there(name, up))]


def gloo_names(value: str) -> Named:
    """Gloo takes every name as it is."""
    return Named(tuple(filter(None, value.split(","))), whole=True)


def nccl_names(value: str) -> Named:
    """NCCL takes beginnings of names, whole ones after `=`; what stands after `^` it leaves out, so none is named."""
    if value.startswith("^"):
        return Named()
    return Named(tuple(filter(None, value.lstrip("=").split(","))), whole=value.startswith("="))


def _means(name: str, one: str, *, whole: bool) -> bool:
    """Whether a name is this one's. Behind a colon stands the port of an adapter; without, any port is meant."""
    device, _, port = name.partition(":")
    there, _, its_port = one.partition(":")
    return (there == device if whole else there.startswith(device)) and port in ("", its_port)


def network(facts: Facts, needs: Needs) -> Answer:
    """The interfaces and adapters that variables name are there and up, and no much faster one lies idle."""
    sockets = [
        gloo_names(facts.variables.get("GLOO_SOCKET_IFNAME", "")),
        nccl_names(facts.variables.get("NCCL_SOCKET_IFNAME", "")),
    ]
    adapters = nccl_names(facts.variables.get("NCCL_IB_HCA", ""))
    links = {n: i for n, i in facts.interfaces.items() if i.up and i.addresses and "127.0.0.1" not in i.addresses}
    found = [_missing_interface(named, facts.interfaces) for named in sockets]
    found += [_missing_adapter(adapters, facts.infiniband), *(_idle(named, links) for named in sockets)]
    first = next(filter(None, found), None)
    if first:
        return first
    if needs.hosts > 1 and not links:
        return "fault", "no interface but loopback is up", "connect the host"
    return good(", ".join(f"{n} {i.mbit_per_s or '?'} Mbit/s" for n, i in sorted(links.items())) or "loopback alone")


def _missing_interface(named: Named, interfaces: Mapping[str, Interface]) -> Answer | None:
    """Of beginnings one that is there will do: lists are written for hosts of several kinds."""
    up = {name: interface.up for name, interface in interfaces.items()}
    dead = named.dead(up)
    if not dead or not (named.whole or len(dead) == len(named.names)):
        return None
    there = named.there(dead[0], up)
    if there:
        return "fault", f"interface {there[0]} is down", f"`ip link set {there[0]} up`, or name another"
    have = ", ".join(sorted(interfaces))
    return "fault", f"no interface {dead[0]}", f"correct GLOO_/NCCL_SOCKET_IFNAME; there are {have}"


def _missing_adapter(named: Named, ports: Mapping[str, bool]) -> Answer | None:
    """Each is wanted: messages are shared among them."""
    for name in named.dead(ports):
        if named.there(name, ports):
            return "fault", f"adapter {name} is down", "look at its cable and port (`ibstat`), or leave it out"
        have = ", ".join(dict.fromkeys(port.partition(":")[0] for port in ports)) or "none"
        return "fault", f"no adapter {name}", f"correct NCCL_IB_HCA; there are {have}"
    return None


def _idle(named: Named, links: Mapping[str, Interface]) -> Answer | None:
    """A much faster interface than the best that is named. One without a device, such as a container's bridge, says any
    rate and leads nowhere."""
    ours = [name for one in named.names for name in named.there(one, links)]
    devices = [name for name, interface in links.items() if interface.device]
    if not ours or not devices:
        return None
    best, fastest = (max(names, key=lambda name: links[name].mbit_per_s) for names in (ours, devices))
    slow, fast = links[best].mbit_per_s, links[fastest].mbit_per_s
    if 0 < 2 * slow <= fast:
        return "advice", f"{best} at {slow} Mbit/s while {fastest} has {fast}", f"name {fastest} instead"
    return None
