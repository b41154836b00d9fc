import asyncio
from contextlib import AsyncExitStack

from mllm_protector.serving.pools import LARGEST, Pools


def test_a_request_goes_to_the_first_pool_with_room_and_then_to_the_emptiest() -> None:
    async def test() -> list[int]:
        pools = Pools(LARGEST + 4)
        clients = []
        async with AsyncExitStack() as stack:
            for _ in range(LARGEST + 5):
                clients.append(await stack.enter_async_context(pools.client()))
        async with pools.client() as first:
            clients.append(first)
        await pools.close()
        return [[*dict.fromkeys(clients)].index(client) for client in clients]

    assert asyncio.run(test()) == [0] * LARGEST + [1] * 4 + [0] + [0]
