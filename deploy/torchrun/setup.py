"""Compiles the API into the package, as descriptors: generated classes would need the protobuf that made them."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent.resolve()
PROTO = HERE.parents[1] / "proto"


class BuildWithApi(build_py):
    def run(self):
        super().run()
        import grpc_tools
        from grpc_tools import protoc

        out = Path(self.build_lib) / "muster_torchrun" / "api.binpb"
        out.parent.mkdir(parents=True, exist_ok=True)
        well_known = Path(grpc_tools.__file__).parent / "_proto"
        arguments = [
            "protoc",
            f"-I{PROTO}",
            f"-I{well_known}",
            "--include_imports",
            f"--descriptor_set_out={out}",
            "muster/v1/rendezvous_service.proto",
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc has failed; its output is above")


setup(cmdclass={"build_py": BuildWithApi})
