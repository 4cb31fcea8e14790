"""Pictures from the network: only from public addresses, each connection pinned to the address that was checked.

A name is resolved once, every address it has must be public, and the connection goes to one of them by number, so
that a name server cannot answer differently the second time. Redirects are followed by hand, each checked again.
"""

import asyncio
import ipaddress
import socket

import httpx

from minivlm.errors import InputError

MAX_REDIRECTS = 3
CONNECT_SECONDS = 5.0
REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 that carries an IPv4 address: NAT64 may lead into the network that the inner address names.
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# All IPv6 addresses of the open internet; others that `ipaddress` calls global are obsolete or of one network only.
UNICAST = ipaddress.ip_network("2000::/3")
# Not of the open internet, whatever the `ipaddress` of this Python knows: documents, relays of old.
RESERVED = tuple(map(ipaddress.ip_network, ("3fff::/20", "192.88.99.0/24")))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Fetcher:
    """Fetches pictures within limits."""

    def __init__(self, max_bytes: int, seconds: float, allow_private: bool = False, most: int = 32):
        """allow_private: also loopback, private and link-local addresses. most: pictures on their way at once."""
        self.max_bytes, self.seconds, self.allow_private = max_bytes, seconds, allow_private
        self._free = asyncio.Semaphore(most)

    async def fetch(self, url: str) -> bytes:
        """The bytes behind an http(s) URL. Raises InputError, one line, for whatever is not there or not allowed."""
        try:
            async with self._free, asyncio.timeout(self.seconds):
                return await self._follow(url)
        except TimeoutError:
            raise InputError(f"picture {_short(url)}: not received within {self.seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise InputError(f"picture {_short(url)}: cannot be fetched ({_reason(error)})") from None

    async def _follow(self, url: str) -> bytes:
        # A client for each picture: no cookie, proxy or kept connection of one request serves another.
        async with httpx.AsyncClient(trust_env=False, timeout=self.seconds) as client:
            at = httpx.URL(url)
            for _ in range(MAX_REDIRECTS + 1):
                response = await client.send(await self._request(client, at), stream=True)
                try:
                    if response.status_code in REDIRECTS and "location" in response.headers:
                        at = at.join(response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise InputError(f"picture {_short(url)}: the server answered {response.status_code}")
                    return await self._read(response, url)
                finally:
                    await response.aclose()
        raise InputError(f"picture {_short(url)}: more than {MAX_REDIRECTS} redirects")

    async def _request(self, client: httpx.AsyncClient, url: httpx.URL) -> httpx.Request:
        """A request to the checked address, with the name where servers and certificates look for it."""
        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"picture {_short(str(url))}: expected an http or https URL")
        if url.userinfo:
            raise InputError("picture: a URL with a user name or password, expected one without")
        address = await self._resolve(url)
        return client.build_request(
            "GET",
            url.copy_with(host=str(address), fragment=None),
            headers={
                "Host": url.netloc.decode("ascii"),
                "User-Agent": "minivlm",
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            },
            extensions={"sni_hostname": url.host},
        )

    async def _resolve(self, url: httpx.URL) -> Address:
        """The address to connect to; InputError if any that the name has is not allowed."""
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise InputError(f"picture {_short(str(url))}: its host name is not known") from None
        addresses = [ipaddress.ip_address(entry[4][0].partition("%")[0]) for entry in found]
        if not self.allow_private and not all(map(is_public, addresses)):
            raise InputError(f"picture {_short(str(url))}: its address is not public, expected one that is")
        return addresses[0]

    async def _read(self, response: httpx.Response, url: str) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_raw():
            size += len(part)
            if size > self.max_bytes:
                raise InputError(f"picture {_short(url)}: larger than {self.max_bytes} bytes")
            parts.append(part)
        return b"".join(parts)


def is_public(address: Address) -> bool:
    """True for an address of the open internet. Addresses that wrap another are judged by the inner one too."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(one) for one in inner if one is not None):
            return False
        if address.ipv4_mapped is not None or address in NAT64:
            return True
        if address not in UNICAST:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in RESERVED)


def _short(url: str) -> str:
    url = " ".join(url.split())
    return url if len(url) <= 100 else f"{url[:80]}... ({len(url)} characters)"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
