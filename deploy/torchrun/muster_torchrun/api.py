"""The messages of muster.v1.RendezvousService, made from the descriptors that are compiled into the package."""

from importlib.resources import files

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

METHOD = "/muster.v1.RendezvousService/Join"


def _messages():
    descriptors = descriptor_pb2.FileDescriptorSet()
    descriptors.ParseFromString((files(__package__) / "api.binpb").read_bytes())
    # A pool of our own: another package of the process may bring other versions of the same files.
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors.file:
        pool.Add(file)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"muster.v1.{name}"))


_message = _messages()
Request = _message("RendezvousServiceJoinRequest")
Response = _message("RendezvousServiceJoinResponse")
Place = _message("AgentPlace")
