"""How fast every computation of this project is, against TRL, padding, and no sharing (stage=bench)."""
