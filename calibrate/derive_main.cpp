#include <cstdio>
#include <exception>
#include "calibrate/fit_gemm.hpp"
#include "calibrate/table_file.hpp"
#include "sim/kernel_prices.hpp"
#include <fmt/core.h>
#include <cstdlib>
using namespace orrery;
int main(int argc,char**argv){
  std::string dir=argv[1];
  for(auto [f,d,fmt_]: std::vector<std::tuple<std::string,std::string,NumberFormat>>{{"h100","fp8_block",NumberFormat::fp8_block},{"h100","bfloat16",NumberFormat::bf16},{"h100","fp8",NumberFormat::fp8_tensor},{"b200","fp8_block",NumberFormat::fp8_block},{"b200","bfloat16",NumberFormat::bf16},{"a100","bfloat16",NumberFormat::bf16},{"h200","fp8_block",NumberFormat::fp8_block}}){
    TableFile t(dir+"/kernels/"+f+"_sxm-gemm.csv.gz");
    int sms=f=="a100"?108:f=="b200"?148:132; double bw=f=="a100"?1.9e12:f=="b200"?7e12:f=="h200"?4e12:3e12;
    std::vector<GemmPoint> train,test;
    auto cd=t.column("gemm_dtype"),cm=t.column("m"),cn=t.column("n"),ck=t.column("k"),cl=t.column("latency");
    for(size_t i=0;i<t.size();++i){ if(t.text(i,cd)!=d) continue;
      GemmPoint p{.groups=1,.m=(int64_t)t.number(i,cm),.n=(int64_t)t.number(i,cn),.k=(int64_t)t.number(i,ck),.sms=sms,.seconds=t.number(i,cl)*1e-3,.at={}};
      if(p.m<128||p.n<128||p.k<128) continue;
      (held_out(p.n,p.k)?test:train).push_back(p);}
    GemmTable g; g.inputs=fmt_; 
    double peak = (f=="a100"?312e12:f=="b200"?2250e12:990e12)*(d=="bfloat16"?1:2)/sms;
    for (int v=0; v<3; ++v) {
      if(v==0) g.model.tiles={{128,128},{128,112},{128,96},{128,64},{64,128},{64,64}};
      if(v==1) g.model.tiles={{128,128},{128,256},{256,128},{128,112},{128,96},{128,64},{64,128},{64,64}};
      if(v==2) g.model.tiles={{128,256},{256,128},{128,192},{128,128},{128,64},{64,256},{64,128},{64,64}};
      GemmModel& m=g.model; m.flops_per_s_per_sm=.8*peak;m.operand_bytes_per_s_per_sm=2e11;m.tile_s=1e-6;m.launch_s=2e-6;m.bytes_per_s=bw;
      std::vector<GemmPoint> sub; for(size_t i=0;i<train.size();i+=5) sub.push_back(train[i]);
      fit_model(g,sub,Limits{peak,f=="a100"?2.04e12:f=="b200"?8e12:f=="h200"?4.8e12:3.35e12});
      Profile pr; pr.device.sms=sms;pr.bandwidth_by_sms={{sms,1.0}};
      g.points=thin(g,train); prepare(g,pr);
      auto e=error_on(g,test,"x"); 
      GemmTable bare=g; bare.points.clear(); auto e0=error_on(bare,test,"x");
      auto big=test; std::erase_if(big,[](auto&p){return p.m<2048;}); auto eb=error_on(g,big,"x");fmt::print("big {:.3f} {:.3f} {:.3f} ",eb.median,eb.percentile_90,eb.bias); fmt::print("{} {} v{} train {} test {} pts {}: F {:.0f} T L {:.1f} TB/s tile {:.2f}us launch {:.2f}us bw {:.2f} | med {:.3f} p90 {:.3f} bias {:.3f} | bare {:.3f} {:.3f}\n",f,d,v,train.size(),test.size(),g.points.size(),m.flops_per_s_per_sm*sms/1e12,m.operand_bytes_per_s_per_sm*sms/1e12,m.tile_s*1e6,m.launch_s*1e6,m.bytes_per_s/1e12,e.median,e.percentile_90,e.bias,e0.median,e0.percentile_90);
      std::fflush(stdout);
    }
  }
}
