"""What the driver module calls exists in NVIDIA's packages under that name; and how a machine without a GPU is met."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda.bindings import driver

import kvferry.cuda.driver
from kvferry.connector.errors import DeviceError
from kvferry.cuda.driver import open_device

SOURCE = Path(kvferry.cuda.driver.__file__).read_text()


def test_every_function_and_constant_exists() -> None:
    functions = set(re.findall(r'"(cu[A-Z]\w+)"', SOURCE)) - {"cuMemcpyBatchAsync"}
    functions |= set(re.findall(r"driver\.(cu[A-Z]\w+)", SOURCE))
    assert len(functions) > 20
    assert [name for name in functions if not hasattr(driver, name)] == []
    enums = (
        driver.CUdevice_attribute,
        driver.CUevent_flags,
        driver.CUmemorytype,
        driver.CUpointer_attribute,
        driver.CUresult,
        driver.CUstream_flags,
        driver.CUmemcpySrcAccessOrder,
    )
    known = {name for enum in enums for name in enum.__members__} | set(vars(driver))
    constants = set(re.findall(r"\b(CU(?:DA)?_[A-Z0-9_]+)\b", SOURCE)) - {"CUDA_VISIBLE_DEVICES"}
    assert len(constants) > 10
    assert constants - known == set()


def test_a_source_is_read_in_the_order_of_the_stream() -> None:
    order = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    assert order == kvferry.cuda.driver._IN_STREAM_ORDER


def test_without_a_driver_the_error_says_what_to_do() -> None:
    try:
        driver.cuInit(0)
    except Exception:  # noqa: BLE001  # boundary: the loader of NVIDIA's libraries
        with pytest.raises(DeviceError, match="no NVIDIA driver"):
            open_device(0)
    else:
        pytest.skip("there is a driver here")
