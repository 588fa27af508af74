"""Which network interface an address of this machine belongs to."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from bloomery.spec.errors import BloomeryError


def interface_of(address: str) -> str:
    """The network interface that has an address (or the one its name stands for). Raises BloomeryError for none."""
    try:
        numbers = {str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(address, None)}
    except OSError as error:
        raise BloomeryError(f"{address}: {error.strerror or error}; name its address in the host file") from None
    if any(ipaddress.ip_address(number).is_loopback for number in numbers):
        numbers |= {"127.0.0.1", "::1"}  # all of 127.0.0.0/8 is this machine, one address of it stands in the list
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] in numbers for entry in addresses):
            return name
    raise BloomeryError(f"no interface here has the address {', '.join(sorted(numbers))} of {address}")
