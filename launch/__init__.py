"""How a run is started: the command line `weft`, and the processes of one machine."""
