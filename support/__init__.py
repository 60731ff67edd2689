"""What every command needs: errors of one sentence, command lines, files, provenance."""
