# Installs edge into .venv here: .\setup.ps1 [--extras serve] [--cuda] [--no-build]. $env:PYTHON names another Python.
Set-Location $PSScriptRoot
foreach ($python in @($env:PYTHON, "python", "python3", "py") | Where-Object { $_ }) {
    if (-not (Get-Command $python -ErrorAction SilentlyContinue)) { continue }
    & $python -c "import sys; sys.exit(sys.version_info < (3, 11) or sys.maxsize < 2**32)" 2>$null
    if ($LASTEXITCODE -eq 0) { & $python -m edge.setup @args; exit $LASTEXITCODE }
}
Write-Host "error: edge needs Python 3.11 or newer, of 64 bits"
Write-Host "  winget install Python.Python.3.13"
exit 1
