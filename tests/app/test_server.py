import pytest

from app.server import StartError, bind


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "256.256.256.256", "no.such.host.invalid"])
def test_a_host_that_nobody_has_is_one_sentence(host: str) -> None:
    with pytest.raises(StartError) as caught:
        bind(host, 0)
    assert len(str(caught.value).splitlines()) == 1
    assert host in str(caught.value)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(StartError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_ipv6_is_a_host_like_any_other() -> None:
    with bind("::1", 0) as listener:
        assert listener.getsockname()[0] == "::1"
