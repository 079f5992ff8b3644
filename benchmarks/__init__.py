"""How close each piece of work is to the limit of this machine; see `run.py`."""
