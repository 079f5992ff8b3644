import subprocess
import sys

import pytest

from fish_speech.datasets.protos.stream import read_shard, write_shard
from fish_speech.datasets.protos.text_data_pb2 import TextData
from tests.conftest import GOLDEN, ROOT

PROTOS = ROOT / "fish_speech" / "datasets" / "protos"


def test_the_generated_module_is_what_the_compiler_makes_of_the_proto(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--python_out={tmp_path}",
         "text_data.proto"],
        check=True,
    )  # fmt: skip
    made = (tmp_path / "text_data_pb2.py").read_text()
    assert made == (PROTOS / "text_data_pb2.py").read_text(), "run 'make protos'"


def test_a_shard_of_the_reference_is_written_back_byte_for_byte(tmp_path):
    write_shard(tmp_path / "again.protos", read_shard(GOLDEN / "shard.protos"))
    assert (tmp_path / "again.protos").read_bytes() == (GOLDEN / "shard.protos").read_bytes()


@pytest.mark.parametrize("cut", [1, 3, 500])
def test_a_shard_cut_short_is_named(tmp_path, cut):
    shard = tmp_path / "cut.protos"
    shard.write_bytes((GOLDEN / "shard.protos").read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"cut\.protos: cut short"):
        list(read_shard(shard))
    shard.write_bytes(b"\x05\x00")
    with pytest.raises(ValueError, match=r"cut\.protos: cut short"):
        list(read_shard(shard))


def test_another_file_is_named(tmp_path):
    shard = tmp_path / "no.protos"
    shard.write_bytes(b"\x04\x00\x00\x00\xff\xff\xff\xff")
    with pytest.raises(ValueError, match=r"no\.protos: not a shard"):
        list(read_shard(shard))


def test_messages_survive_the_stream(tmp_path):
    messages = [TextData(source="a", name=str(number)) for number in range(3)]
    write_shard(tmp_path / "x.protos", iter(messages))
    assert list(read_shard(tmp_path / "x.protos")) == messages
