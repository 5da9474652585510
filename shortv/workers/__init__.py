"""Work spread over a Ray cluster: the only room that imports ray."""
