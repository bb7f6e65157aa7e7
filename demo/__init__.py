"""`make demo`: the whole product on one machine, on a real model and real text."""
