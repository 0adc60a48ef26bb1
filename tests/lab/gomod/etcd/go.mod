// The etcd server of the lab.
module certbotk8s.io/lab/etcd

go 1.26.0

require go.etcd.io/etcd/server/v3 v3.7.3
