"""What a run will need before it is started: memory, time, cost, and what the loader and the links have to give."""
