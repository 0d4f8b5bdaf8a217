"""`python -m fedzo.resident NAME`: the worker of that name. Nodes start it; nobody need do so by hand."""

import os
import sys

from fedzo.errors import FedzoError
from fedzo.resident.server import main

try:
    code = main(*sys.argv[1:])
except FedzoError as error:
    sys.exit(str(error))
os._exit(code)  # threads that still talk to a node that is gone are not waited for
