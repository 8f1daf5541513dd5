"""Which SuperNodes are online, asked of the SuperLink by a program of the server: no run is needed."""

from __future__ import annotations


def online_keys(address: str, authority: str) -> set[bytes]:
    """Ask a SuperLink's control API which SuperNodes are online; return their public keys (PEM).

    `address` is host:port, `authority` the file of the certificate that is trusted. Raises httpx.HTTPError where the
    SuperLink does not say. One that was killed counts until two heartbeats of 30 s are missing.
    """
    # Here and not above: most checks find no SuperLink to ask, and Flower takes a second to import.
    from flwr.proto.control_pb2 import ListNodesRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    client = ControlHttpClient.from_server_address(address, False, authority, [version])
    try:
        nodes = client.ListNodes(ListNodesRequest()).nodes_info
    finally:
        client.close()
    return {node.public_key for node in nodes if node.status == "online"}
