import asyncio

import pytest

from app.api.generation import InFlight


def test_no_request_is_in_flight_after_the_last_one_has_ended() -> None:
    async def main() -> None:
        in_flight = InFlight()
        await in_flight.none()
        with in_flight.one():
            with pytest.raises(ValueError), in_flight.one():
                raise ValueError
            waiting = asyncio.ensure_future(in_flight.none())
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        await in_flight.none()

    asyncio.run(main())
