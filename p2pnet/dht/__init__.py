"""The distributed hash table: who is where, and the signed records that say so (DESIGN D4, D5)."""
