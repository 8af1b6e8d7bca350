"""Each module measures one part of the system against a peer or a floor in the same run."""
