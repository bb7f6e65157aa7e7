"""The network's edge: options, messages and errors that both sides share.

gRPC's fork handlers are switched off before it is loaded: with them a process that a DataLoader forks beside an open
stream dies of a segmentation fault (grpcio 1.85); without them it runs, as long as it makes no calls of its own.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a server that goes away is this package's to tell, in its words
