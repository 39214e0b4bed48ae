import asyncio

import pytest

from app.api.owed import Owed


def test_none_is_owed_when_the_last_of_several_is_paid() -> None:
    async def main() -> None:
        owed = Owed()
        await owed.none()
        with owed.one():
            with pytest.raises(ValueError), owed.one():
                raise ValueError
            waiting = asyncio.ensure_future(owed.none())
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        await owed.none()

    asyncio.run(main())
