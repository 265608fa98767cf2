# As init, for PowerShell: .env with a key, once.
$ErrorActionPreference = "Stop"
$file = Join-Path $PSScriptRoot ".env"
if (Test-Path $file) { Write-Output "deploy\.env is there already and stays as it is"; exit 0 }
$text = [IO.File]::ReadAllText((Join-Path $PSScriptRoot "env.example"))
foreach ($name in "EDGE_API_KEY", "EDGE_ADMIN_KEY") {
    $bytes = New-Object byte[] 24
    [Security.Cryptography.RandomNumberGenerator]::Create().GetBytes($bytes)
    $key = -join ($bytes | ForEach-Object { $_.ToString("x2") })
    $text = $text -replace "(?m)^$name=.*$", "$name=$key"
}
[IO.File]::WriteAllText($file, $text)
Write-Output "deploy\.env: the keys are in it; the page asks for one as a password, clients send it as their API key"
