"""Ray Serve replicas that answer under every plan, and the endpoint before them."""
