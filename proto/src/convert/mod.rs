//! Wire to checked types and back. Wire types go no further than here and the gRPC handlers.
