"""Generated from proto/logitstream/rpc/v1 by `make proto`."""
